"""Pure mask making: tensor in, mask out. No modules, no files."""
