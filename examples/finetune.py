"""Win back what pruning lost: train the kept weights to predict as the dense model does; pruned weights stay zero.

    python examples/finetune.py PRUNED DENSE TEXT OUT
    python examples/finetune.py PRUNED DENSE TEXT OUT --lora 16
    accelerate launch --config_file fsdp.yaml examples/finetune.py PRUNED DENSE TEXT OUT --bf16

PRUNED is a checkpoint that llm-barber pruned, DENSE the model that it was pruned from, TEXT a .txt, .jsonl or .parquet
file to train on, or `builtin`. OUT becomes a plain checkpoint with a record. The loss is the Kullback-Leibler
divergence of the model's next-token distribution from the dense model's. The script prints perplexity and divergence
on held-out text, before and after. docs/guide/finetune.md has fsdp.yaml.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from llm_barber import EvaluateConfig, HoldZeros, evaluate, merge_adapter, save_finetuned
from llm_barber.text.calibration import read_text
from llm_barber.text.windows import windows_of


class Windows(Dataset):
    """Windows of a text, token ids, int64 (windows, seqlen)."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index]}


class Distiller(Trainer):
    """Trains a model to predict as a teacher does.

    Args:
        teacher: the dense model; it is not trained. Where the model is sharded by FSDP, so is the teacher.
        settings: as of `Trainer`.
    """

    def __init__(self, teacher: nn.Module, **settings: Any) -> None:
        super().__init__(**settings)
        self.model_accepts_loss_kwargs = False  # the loss is a mean: Trainer divides it by the accumulation steps
        teacher = teacher.eval().requires_grad_(False)
        self.teacher = shard(teacher) if self.is_fsdp_enabled else teacher.to(self.args.device)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """Mean divergence over the tokens of a batch, nats."""
        with torch.no_grad():
            target = self.teacher(**inputs).logits.float().log_softmax(-1)
        predicted = model(**inputs).logits.float().log_softmax(-1)
        divergence = nn.functional.kl_div(predicted, target, reduction="none", log_target=True)
        return divergence.sum(-1).mean()


def shard(model: nn.Module) -> nn.Module:
    """Shard a model over all processes, each of its decoder layers by itself."""
    from torch.distributed.fsdp import fully_shard

    layers = max(
        (m for m in model.modules() if isinstance(m, nn.ModuleList)), key=lambda m: sum(1 for _ in m.modules())
    )
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def training_windows(texts: list[str], tokenizer: Any, seqlen: int) -> Tensor:
    """The windows of some texts, one after the other, int64 (windows, seqlen)."""
    windows = torch.cat([windows_of(read_text(text), tokenizer, seqlen, bos=True)[0] for text in texts])
    if not len(windows):
        raise SystemExit(f"{', '.join(texts)}: shorter than one window of {seqlen} tokens")
    return windows


def training_arguments(options: argparse.Namespace, folder: Path) -> TrainingArguments:
    """AdamW at a rate that falls to zero; `folder` is for checkpoints of the training."""
    return TrainingArguments(
        output_dir=str(folder), max_steps=options.steps, per_device_train_batch_size=1,
        gradient_accumulation_steps=options.batch, learning_rate=options.rate, lr_scheduler_type="linear",
        weight_decay=0.0, max_grad_norm=1.0, bf16=options.bf16, use_cpu=not torch.cuda.is_available(),
        logging_steps=max(1, options.steps // 20), save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500, save_total_limit=1, report_to=[], seed=options.seed,
    )  # fmt: skip


def finetune(options: argparse.Namespace) -> None:
    """Train, and write OUT."""
    set_seed(options.seed)
    # Weights are trained in float32: in bfloat16 most steps of this size would be rounded away.
    model = AutoModelForCausalLM.from_pretrained(options.pruned, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(
        options.dense, dtype=torch.bfloat16 if options.bf16 else torch.float32
    )
    windows = training_windows(options.text.split(","), AutoTokenizer.from_pretrained(options.pruned), options.seqlen)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=options.lora, lora_alpha=2 * options.lora, target_modules="all-linear")
        )
    training_folder = Path(f"{options.out}.training")
    trainer = Distiller(
        teacher, model=model, args=training_arguments(options, training_folder), train_dataset=Windows(windows),
        callbacks=[HoldZeros()],
    )  # fmt: skip
    resumes = bool(options.save_steps) and any(training_folder.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=resumes)
    if options.lora:
        merge_adapter(trainer.model, options.out, options.pruned)
    else:
        save_finetuned(trainer.model, options.out, options.pruned)


def show(options: argparse.Namespace) -> None:
    """Print perplexity and divergence from the dense model on held-out text, before and after."""
    print(f"{options.held_out}: {options.windows} windows of {options.seqlen} tokens")
    print("           perplexity      KL")
    for name, folder in (("before", options.pruned), ("after", options.out)):
        settings = {"text": (options.held_out,), "windows": options.windows, "seqlen": options.seqlen}
        (text,) = evaluate(EvaluateConfig(model=folder, against=options.dense, dtype="float32", **settings)).texts
        print(f"{name:<8} {text.perplexity:12.3f} {text.against.divergence:7.4f}")
    print(f"{'dense':<8} {text.against.perplexity:12.3f} {0:7.4f}")


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", help="folder of the pruned checkpoint, with its barber.json")
    parser.add_argument("dense", help="folder or hub id of the dense model")
    parser.add_argument("text", help="text to train on: files or `builtin`, with commas between them")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--steps", type=int, default=250, help="steps of the optimiser (default: 250)")
    parser.add_argument("--batch", type=int, default=4, help="windows a step and process (default: 4)")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens a window (default: 512)")
    parser.add_argument("--rate", type=float, default=5e-5, help="learning rate at the first step (default: 5e-5)")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train LoRA of this rank, and merge it")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16; weights are trained in float32")
    parser.add_argument("--held-out", default="wikitext2", help="text to measure on (default: wikitext2)")
    parser.add_argument("--windows", type=int, default=32, help="windows to measure on (default: 32)")
    parser.add_argument(
        "--save-steps", type=int, default=0, metavar="N",
        help="save the training every N steps; the same command then continues it (default: 0, never)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    """Train, and say what it gained."""
    options = make_parser().parse_args()
    finetune(options)
    is_first_process = not dist.is_initialized() or dist.get_rank() == 0
    if dist.is_initialized():
        dist.destroy_process_group()
    if is_first_process:
        show(options)


if __name__ == "__main__":
    main()
