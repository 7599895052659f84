"""Parts that the kernels share: a lane takes a chunk of 8 columns of a row, and finds its bits and its values.

The value of column c of a row has the number, within the row, of the set bits before c:

    number(c) = starts[⌊c / 64⌋] + popcount(words[⌊c / 64⌋] & (2^(c mod 64) − 1))

That is computed once a chunk. Within a chunk, products of integers count the set bits before each of 4 columns at once.
"""

import triton
import triton.language as tl


# Triton reads the annotations of a kernel and knows only its own.
@triton.jit  # type: ignore[untyped-decorator]
def count_bits(word):  # type: ignore[no-untyped-def]
    """Number of set bits of unsigned 64-bit words; LLVM makes the GPU's own instruction of this form."""
    word = word - ((word >> 1) & 0x5555555555555555)
    word = (word & 0x3333333333333333) + ((word >> 2) & 0x3333333333333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((word * 0x0101010101010101) >> 56).to(tl.uint32)


@triton.jit  # type: ignore[untyped-decorator]
def find_chunk(values, words, starts, chunk, inside, aside):  # type: ignore[no-untyped-def]
    """Bits of chunks, (height, lanes), the first column in the lowest bit, and pointers to their first values.

    Args:
        values: pointers to the rows' values, (height, 1).
        words: pointers to the rows' bits, (height, lanes), each `aside` too far, like starts.
        starts: pointers to the rows' starts.
        chunk: number of each lane's chunk in the row, (lanes,).
        inside: whether the row has the chunk, (lanes,); others have no bits.
        aside: numbers of the lanes, (lanes,).
    """
    offset = ((chunk >> 3) - aside)[None, :]
    word = tl.load(words + offset, mask=inside[None, :], other=0).to(tl.uint64, bitcast=True)
    start = tl.load(starts + offset, mask=inside[None, :]).to(tl.uint32)
    shift = ((chunk & 7) << 3).to(tl.uint64)[None, :]
    below = (tl.full(shift.shape, 1, tl.uint64) << shift) - 1
    bits_of_value: tl.constexpr = values.dtype.element_ty.primitive_bitwidth
    offset = (start + count_bits(word & below)) * (bits_of_value // 8)
    return (word >> shift).to(tl.uint32), (values.to(tl.pointer_type(tl.uint8)) + offset).to(values.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def count_four(bits, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """`size` times the number of set bits up to and with each of the four lowest bits, a byte each.

    Example: the bits 1101, that is columns 0, 2 and 3, are spread to 0x01010001; the result is 0x03020101 · size.
    """
    return (((bits & 15) * 0x00204081) & 0x01010101) * (0x01010101 * size)


@triton.jit  # type: ignore[untyped-decorator]
def load_value(values, offset, kept):  # type: ignore[no-untyped-def]
    """Values at an offset of bytes, 0 where none is kept."""
    return tl.load((values.to(tl.pointer_type(tl.uint8)) + offset).to(values.dtype), mask=kept, other=0)


@triton.jit  # type: ignore[untyped-decorator]
def take_four(values, bits):  # type: ignore[no-untyped-def]
    """Weights of the four lowest bits, each (height, lanes), 0 where a bit is not set, and pointers to the next values.

    A bit is set where the number of set bits grows.

    Args:
        values: pointers to the first values, (height, lanes).
        bits: (height, lanes).
    """
    bits_of_value: tl.constexpr = values.dtype.element_ty.primitive_bitwidth
    counts = count_four(bits, bits_of_value // 8)
    c0, c1, c2, c3 = counts & 255, (counts >> 8) & 255, (counts >> 16) & 255, counts >> 24
    w0 = tl.load(values, mask=c0 != 0, other=0)
    w1 = load_value(values, c0, c1 != c0)
    w2 = load_value(values, c1, c2 != c1)
    w3 = load_value(values, c2, c3 != c2)
    return w0, w1, w2, w3, (values.to(tl.pointer_type(tl.uint8)) + c3).to(values.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def take_chunk(values, bits):  # type: ignore[no-untyped-def]
    """Weights of the eight columns of chunks, each (height, lanes), 0 where the bit is not set; as `take_four`."""
    w0, w1, w2, w3, values = take_four(values, bits)
    w4, w5, w6, w7, _ = take_four(values, bits >> 4)
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit  # type: ignore[untyped-decorator]
def as_float32(weight):  # type: ignore[no-untyped-def]
    """Weights as float32."""
    if weight.dtype == tl.int8:
        # The GPU converts integers at a quarter of the speed of other instructions: the byte becomes the lowest
        # bits of the float 2²³, its sign bit flipped.
        bits = weight.to(tl.uint8, bitcast=True).to(tl.int32) ^ 0x4B000080
        return bits.to(tl.float32, bitcast=True) - 8388736.0
    else:
        return weight.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def load_four(inputs, offset, inside, lanes: tl.constexpr):  # type: ignore[no-untyped-def]
    """Four inputs of each lane as float32, each (lanes,), by one load of 16 bytes of float32."""
    x = tl.load(inputs + offset[:, None] + tl.arange(0, 4)[None, :], mask=inside[:, None], other=0)
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (lanes, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit  # type: ignore[untyped-decorator]
def load_chunk(inputs, chunk, inside, lanes: tl.constexpr):  # type: ignore[no-untyped-def]
    """Inputs of the eight columns of chunks as float32, each (lanes,); 0 outside. A load takes at most 16 bytes.

    Args:
        inputs: pointer to a row of inputs.
        chunk: number of each lane's chunk in the row, (lanes,).
        inside: whether the row has the chunk, (lanes,).
        lanes: number of chunks.
    """
    if inputs.dtype.element_ty == tl.float32:
        x0, x1, x2, x3 = load_four(inputs, chunk * 8, inside, lanes)
        x4, x5, x6, x7 = load_four(inputs, chunk * 8 + 4, inside, lanes)
    else:
        x = tl.load(inputs + chunk[:, None] * 8 + tl.arange(0, 8)[None, :], mask=inside[:, None], other=0)
        even, odd = tl.split(tl.reshape(x.to(tl.float32), (lanes, 4, 2)))
        even_low, even_high = tl.split(tl.reshape(even, (lanes, 2, 2)))
        odd_low, odd_high = tl.split(tl.reshape(odd, (lanes, 2, 2)))
        x0, x4 = tl.split(even_low)
        x2, x6 = tl.split(even_high)
        x1, x5 = tl.split(odd_low)
        x3, x7 = tl.split(odd_high)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit  # type: ignore[untyped-decorator]
def take_tile(values, bits, height: tl.constexpr, lanes: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weights of chunks as a tile, (height, 8 · lanes), 0 where the bit is not set; arguments as of `take_chunk`."""
    w0, w1, w2, w3, w4, w5, w6, w7 = take_chunk(values, bits)
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return tl.reshape(tl.join(even, odd), (height, 8 * lanes))
