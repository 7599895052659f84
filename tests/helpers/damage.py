"""Random damage to the bytes of a file."""

import random


def damaged(original: bytes, generator: random.Random, first: int) -> bytearray:
    """Change, drop or insert bytes at one to eight places.

    Half of the changes go to the first `first` bytes: the header and the index decide most.
    """
    content = bytearray(original)
    for _ in range(generator.choice((1, 1, 2, 8))):
        end = min(len(content), first) if generator.random() < 0.5 else len(content)
        position = generator.randrange(max(end, 1))
        match generator.randrange(4):
            case 0:
                content[position] ^= 1 << generator.randrange(8)
            case 1:
                content[position : position + 1] = bytes([generator.choice(b'0123456789{}[]",:-')])
            case 2:
                del content[position : position + generator.randrange(1, 20)]
            case 3:
                content[position:position] = generator.choice((b"9" * 20, b"-1", b"\x00", b"[[", b'"'))
        if not content:
            break
    return content
