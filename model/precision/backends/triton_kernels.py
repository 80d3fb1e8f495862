"""The Triton kernels of `model.precision.backends.triton`; imported only where Triton is installed.

A program works on 16 rows of one group by WIDTH columns: `program_id(0)` counts blocks of 16 rows, `program_id(1)` tiles of columns. Inside,
elements are seen as [outer, 16, inner], so that one piece of code quantises both kinds of operand along dimension 1:

    blocks along rows      [16 * WIDTH / 16, 16, 1]        a thread, or a few neighbours, hold a block
    blocks along columns   [1, 16, WIDTH]                  a thread holds whole blocks, of adjacent columns

What makes the values those of `model.precision.nvfp4` bit for bit:

    order        every fp32 operation is written as it is there; the launch forbids fusing a multiplication and an addition
    division     `div_rn`: Triton's `/` is approximate on a GPU
    rotation     16 steps of fma, x_k * (1/4 or -1/4) added for k = 0 ... 15, which is what an fp32 GEMM does on a CPU; no tensor cores
    rounding     by adding and subtracting 1.5 * 2^23 steps; the step comes from the exponent bits
    NaN          maxima are taken of the bits of |x| as integers, where NaN is above infinity; limits are `where(x > limit, limit, x)`, which
                 keeps NaN, unlike `minimum`
    sums         of 4over6, of pairs at a time: halves added to halves
"""

import torch
import triton
import triton.language as tl

FLT_MAX = tl.constexpr(torch.finfo(torch.float32).max)
SIXTH = tl.constexpr(1 / 6)

# Where random bytes come from, how scales are chosen, and along what blocks are rotated.
NEAREST = tl.constexpr(0)
GIVEN = tl.constexpr(1)
PHILOX = tl.constexpr(2)
SATURATE = tl.constexpr(0)
MAE = tl.constexpr(1)
MSE = tl.constexpr(2)
NOT = tl.constexpr(0)
DOWN = tl.constexpr(1)
ACROSS = tl.constexpr(2)


# -- loading -------------------------------------------------------------------------------------------------------------------------------


@triton.jit
def _block_of_rows(block_map, rows, GROUPED: tl.constexpr):
    """First source row, number of rows and group of this program's block. block_map: int32 [3, blocks]."""
    block = tl.program_id(0)
    if GROUPED:
        blocks = tl.num_programs(0)
        first = tl.load(block_map + block)
        count = tl.load(block_map + blocks + block)
        group = tl.load(block_map + 2 * blocks + block)
    else:
        first = block * 16
        count = tl.minimum(rows - first, 16)
        group = 0
    return first.to(tl.int64), count, group


# bf16 by integer arithmetic: as fast, and Triton's interpreter, unlike a GPU, does not round to nearest even there nor widen denormals.
@triton.jit
def _widen(x):
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _round_to(x, dtype: tl.constexpr):
    """fp32 x rounded to a dtype, as fp32."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x != x, x, nearest.to(tl.float32, bitcast=True))
    return x.to(dtype).to(tl.float32)


@triton.jit
def _load(x, first, count, column, features):
    """fp32 [16, WIDTH], 0 outside."""
    row = tl.arange(0, 16)
    inside = (row < count)[:, None] & (column < features)[None, :]
    values = tl.load(x + (first + row)[:, None] * features + column[None, :], mask=inside, other=0.0)
    return _widen(values)


@triton.jit
def _entry(k, out, rotation):
    """1/4 or -1/4: element (k, out) of the rotation whose sign k is negative where bit k of `rotation` is set."""
    # Sylvester's entry is negative where k & out has an odd number of ones.
    ones = out & k
    ones = ones ^ (ones >> 2)
    ones = ones ^ (ones >> 1)
    ones = ones ^ ((rotation >> k) & 1)
    return tl.where((ones & 1) == 1, -0.25, 0.25)


@triton.jit
def _load_rotated(x, first, count, column, features, rotation, ROTATE: tl.constexpr, WIDTH: tl.constexpr):
    """The same, rotated along the 16 rows (DOWN) or along every 16 columns (ACROSS), and rounded to x's dtype."""
    row = tl.arange(0, 16)
    total = tl.zeros([16, WIDTH], tl.float32)
    for k in tl.static_range(16):
        if ROTATE == DOWN:
            one = tl.load(
                x + (first + k) * features + column, mask=(column < features) & (tl.full([WIDTH], k, tl.int32) < count), other=0.0
            )
            values = tl.broadcast_to(_widen(one)[None, :], [16, WIDTH])
            entry = _entry(k, row[:, None], rotation)
        else:
            source = (column // 16) * 16 + k
            inside = (row < count)[:, None] & (source < features)[None, :]
            values = _widen(tl.load(x + (first + row)[:, None] * features + source[None, :], mask=inside, other=0.0))
            entry = _entry(k, (column % 16)[None, :], rotation)
        total = tl.fma(values, tl.broadcast_to(entry, [16, WIDTH]), total)
    return _round_to(total, x.dtype.element_ty)


@triton.jit
def _magnitude_bits(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


# -- random bytes --------------------------------------------------------------------------------------------------------------------------


@triton.jit
def _philox_bytes(
    sample, position, expert, feature_blocks, key0, key1, step, first, count, features, EXPERT: tl.constexpr, WIDTH: tl.constexpr
):
    """`model.precision.philox.Stream.bytes` of this program's elements, uint32 [16, WIDTH]. feature_blocks: int32, global feature // 16."""
    BLOCKS: tl.constexpr = WIDTH // 16
    row = tl.arange(0, 16)
    present = row < count
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    nothing = tl.zeros([16, BLOCKS], tl.uint32)
    word0 = nothing + tl.load(feature_blocks + block, mask=block * 16 < features, other=0).to(tl.uint32)[None, :]
    if EXPERT:
        word0 = word0 | ((tl.load(expert + first + row, mask=present, other=0) + 1) << 20).to(tl.uint32)[:, None]
    word1 = nothing + tl.load(position + first + row, mask=present, other=0).to(tl.uint32)[:, None]
    word2 = nothing + tl.load(sample + first + row, mask=present, other=0).to(tl.uint32)[:, None]
    word3 = nothing + step.to(tl.uint32, bitcast=True)
    r0, r1, r2, r3 = tl.philox_impl(word0, word1, word2, word3, key0.to(tl.uint32, bitcast=True), key1.to(tl.uint32, bitcast=True))
    # Joined so that the four words of a block come one after another; word w holds the bytes of features 4 w ... 4 w + 3.
    words = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), [16, WIDTH // 4, 1])
    each = (words >> (tl.arange(0, 4) * 8).to(tl.uint32)[None, None, :]) & 255
    return tl.reshape(each, [16, WIDTH])


@triton.jit
def _random(
    bits,
    sample,
    position,
    expert,
    feature_blocks,
    key0,
    key1,
    step,
    first,
    count,
    column,
    features,
    RANDOM: tl.constexpr,
    EXPERT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Random bytes as fp32 [16, WIDTH], 0 in padding rows (which a rotation fills)."""
    row = tl.arange(0, 16)
    if RANDOM == GIVEN:
        inside = (row < count)[:, None] & (column < features)[None, :]
        random = tl.load(bits + (first + row)[:, None] * features + column[None, :], mask=inside, other=0).to(tl.float32)
    elif RANDOM == PHILOX:
        random = _philox_bytes(sample, position, expert, feature_blocks, key0, key1, step, first, count, features, EXPERT, WIDTH)
        random = tl.where((row < count)[:, None], random.to(tl.float32), 0.0)
    else:
        random = tl.zeros([16, WIDTH], tl.float32)
    return random


# -- quantisation of [outer, 16, inner] ----------------------------------------------------------------------------------------------------


@triton.jit
def _binade(x, SMALLEST: tl.constexpr):
    return (tl.maximum(x, SMALLEST).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _round_e4m3(x):
    """x >= 0 or NaN."""
    x = tl.where(x > 448.0, 448.0, x)
    shift = _binade(x, 0.015625) * 1572864.0  # a step is 1/8 of the power of two below, and of 2^-6 among the subnormal values
    return (x + shift) - shift


@triton.jit
def _global_scale(amax, TOP: tl.constexpr):
    scale = tl.div_rn(TOP, amax)
    scale = tl.where(scale > FLT_MAX, FLT_MAX, scale)
    return tl.where((amax == 0.0) | (scale == 0.0), 1.0, scale)


@triton.jit
def _encode(x, block_scale, scale, random, RANDOM: tl.constexpr):
    """E2M1 values of x, fp32, and what they were before rounding, which has their signs also where they are 0."""
    enc = tl.div_rn(1.0, block_scale * tl.div_rn(1.0, scale))
    scaled = x * tl.where(enc > FLT_MAX, FLT_MAX, enc)
    scaled = tl.where(scaled > 6.0, 6.0, scaled)
    scaled = tl.where(scaled < -6.0, -6.0, scaled)
    magnitude = tl.abs(scaled)
    if RANDOM == NEAREST:
        shift = _binade(magnitude, 1.0) * 6291456.0  # 1.5 * 2^23 steps of half the power of two
        code = (scaled + shift) - shift
    else:
        moved = random * 0.001953125 * _binade(magnitude, 1.0) + magnitude
        step = _binade(moved, 1.0) * 0.5
        per_step = (0x7F000000 - step.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)  # exactly 1 / step
        code = tl.floor(moved * per_step) * step
        code = tl.where(code > 6.0, 6.0, code)
        code = tl.where(scaled < 0.0, -code, code)
    return code, scaled


@triton.jit
def _fold(x, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Sum along dimension 1, halves added to halves: [outer, inner]."""
    x = tl.sum(tl.reshape(x, [OUTER, 2, 8, INNER]), axis=1)
    x = tl.sum(tl.reshape(x, [OUTER, 2, 4, INNER]), axis=1)
    x = tl.sum(tl.reshape(x, [OUTER, 2, 2, INNER]), axis=1)
    return tl.sum(x, axis=1)


@triton.jit
def _error(
    x, code, block_scale, amax, TOP: tl.constexpr, CLIPPING: tl.constexpr, TILES: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr
):
    """What 4over6 compares, [outer, 1, inner]."""
    difference = tl.div_rn(code * block_scale * amax, TOP) - x
    if CLIPPING == MAE:
        difference = tl.abs(difference)
    else:
        difference = difference * difference
    # One after another; a sum in which all but one are zero takes that one out.
    index = tl.arange(0, 16)[None, :, None]
    total = tl.sum(tl.where(index == 0, difference, 0.0), axis=1)
    for j in tl.static_range(1, 16):
        total = total + tl.sum(tl.where(index == j, difference, 0.0), axis=1)
    if TILES:
        total = _fold(tl.reshape(total, [1, 16, OUTER // 16]), 1, OUTER // 16)
        total = tl.broadcast_to(total, [16, OUTER // 16])
    return tl.reshape(total, [OUTER, 1, INNER])


@triton.jit
def _quantize(
    x,
    random,
    amax,
    TOP: tl.constexpr,
    RANDOM: tl.constexpr,
    CLIPPING: tl.constexpr,
    TILES: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
):
    """Codes [outer, 16, inner], scales [outer, 1, inner] and what has the signs of the codes, fp32. amax: a scalar or of the scales' shape.
    TILES: the outer dimension is [16 rows, blocks], and the rows share a scale."""
    largest = tl.max(_magnitude_bits(x), axis=1)
    if TILES:
        largest = tl.broadcast_to(tl.max(tl.reshape(largest, [16, OUTER // 16]), axis=0)[None, :], [16, OUTER // 16])
    largest = tl.reshape(largest, [OUTER, 1, INNER]).to(tl.float32, bitcast=True)
    scale = _global_scale(amax, TOP)
    wanted = largest * (scale * SIXTH)
    if CLIPPING != SATURATE:
        wanted = tl.div_rn(largest, 6.0) * scale
    block_scale = _round_e4m3(wanted)
    code, scaled = _encode(x, block_scale, scale, random, RANDOM)
    if CLIPPING != SATURATE:
        scale_to_four = _round_e4m3(wanted * 1.5)
        code_to_four, scaled_to_four = _encode(x, scale_to_four, scale, random, RANDOM)
        four = _error(x, code_to_four, scale_to_four, amax, TOP, CLIPPING, TILES, OUTER, INNER) < _error(
            x, code, block_scale, amax, TOP, CLIPPING, TILES, OUTER, INNER
        )
        code = tl.where(four, code_to_four, code)
        block_scale = tl.where(four, scale_to_four, block_scale)
        scaled = tl.where(four, scaled_to_four, scaled)
    return code, block_scale, scaled


@triton.jit
def _pack(code, scaled, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Two codes a byte, the even one in the low nibble: [outer, 8, inner]."""
    magnitude = tl.abs(code)
    index = tl.where(magnitude <= 2.0, magnitude * 2.0, tl.where(magnitude <= 4.0, magnitude + 2.0, 7.0)).to(tl.int32)
    index = index | ((scaled < 0.0).to(tl.int32) << 3)
    index = index << ((tl.arange(0, 16) & 1) * 4)[None, :, None]
    return tl.sum(tl.reshape(index, [OUTER, 8, 2, INNER]), axis=2).to(tl.uint8)


@triton.jit
def _scale_byte(scale):
    """Raw E4M3 of an E4M3 value: exponent and mantissa moved down, with the bias of 127 replaced by 7; steps of 2^-9 below 2^-6."""
    normal = (scale.to(tl.int32, bitcast=True) >> 20) - 960
    small = (tl.where(scale < 0.015625, scale, 0.0) * 512.0).to(tl.int32)
    byte = tl.where(scale < 0.015625, small, normal)
    return tl.where(scale != scale, 0x7F, byte).to(tl.uint8)


# -- kernels -------------------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rotation"])
def amax_kernel(
    x,
    block_map,
    rotation,
    result,
    rows,
    features,
    GROUPED: tl.constexpr,
    ROTATE: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """result: int32 [groups], zeros, which receives the bits of each group's amax. TILES: tiles of columns of one program."""
    first, count, group = _block_of_rows(block_map, rows, GROUPED)
    largest = tl.zeros([16, WIDTH], tl.int32)
    for tile in range(TILES):
        column = (tl.program_id(1) * TILES + tile) * WIDTH + tl.arange(0, WIDTH)
        if ROTATE != NOT:
            values = _load_rotated(x, first, count, column, features, rotation, ROTATE, WIDTH)
        else:
            values = _load(x, first, count, column, features)
        largest = tl.maximum(largest, _magnitude_bits(values))
    tl.atomic_max(result + group, tl.max(tl.max(largest, axis=0), axis=0), sem="relaxed")


@triton.jit(do_not_specialize=["key0", "key1", "step", "rotation"])
def rows_kernel(
    x,
    amax,
    block_map,
    bits,
    sample,
    position,
    expert,
    feature_blocks,
    key0,
    key1,
    step,
    rotation,
    result,
    scales,
    rows,
    features,
    GROUPED: tl.constexpr,
    ROW_SCALED: tl.constexpr,
    RANDOM: tl.constexpr,
    EXPERT: tl.constexpr,
    CLIPPING: tl.constexpr,
    TOP: tl.constexpr,
    ROTATE: tl.constexpr,
    TILES: tl.constexpr,
    PACKED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """result: products [rows, features]; or, PACKED, codes, with scales. TOP: largest code times largest block scale."""
    BLOCKS: tl.constexpr = WIDTH // 16
    OUTER: tl.constexpr = 16 * BLOCKS
    first, count, group = _block_of_rows(block_map, rows, GROUPED)
    row = tl.arange(0, 16)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    if ROTATE != NOT:
        values = _load_rotated(x, first, count, column, features, rotation, ROTATE, WIDTH)
    else:
        values = _load(x, first, count, column, features)
    x_block = tl.reshape(values, [OUTER, 16, 1])
    if ROW_SCALED:
        of_rows = tl.load(amax + first + row, mask=row < count, other=0.0)
        of_block = tl.reshape(tl.broadcast_to(of_rows[:, None], [16, BLOCKS]), [OUTER, 1, 1])
    else:
        of_block = tl.load(amax + group)
    random = _random(
        bits, sample, position, expert, feature_blocks, key0, key1, step, first, count, column, features, RANDOM, EXPERT, WIDTH
    )
    code, scale, scaled = _quantize(x_block, tl.reshape(random, [OUTER, 16, 1]), of_block, TOP, RANDOM, CLIPPING, TILES, OUTER, 1)
    if PACKED:
        blocks = tl.cdiv(features, 16)
        half = tl.program_id(1) * (WIDTH // 2) + tl.arange(0, WIDTH // 2)
        block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        codes = tl.reshape(_pack(code, scaled, OUTER, 1), [16, WIDTH // 2])
        inside = (row < count)[:, None] & (half < blocks * 8)[None, :]
        tl.store(result + (first + row)[:, None] * (blocks * 8) + half[None, :], codes, mask=inside)
        scale_bytes = tl.reshape(_scale_byte(scale), [16, BLOCKS])
        if TILES:  # every row has the scale: the first one writes it
            address = first // 16 * blocks + row[:, None] * 0 + block[None, :]
            tl.store(scales + address, scale_bytes, mask=(row == 0)[:, None] & (block < blocks)[None, :])
        else:
            address = (first + row)[:, None] * blocks + block[None, :]
            tl.store(scales + address, scale_bytes, mask=(row < count)[:, None] & (block < blocks)[None, :])
    else:
        products = tl.reshape(code * scale, [16, WIDTH]).to(result.dtype.element_ty)
        inside = (row < count)[:, None] & (column < features)[None, :]
        tl.store(result + (first + row)[:, None] * features + column[None, :], products, mask=inside)


@triton.jit(do_not_specialize=["key0", "key1", "step", "rotation"])
def columns_kernel(
    x,
    amax,
    block_map,
    bits,
    sample,
    position,
    expert,
    feature_blocks,
    key0,
    key1,
    step,
    rotation,
    result,
    scales,
    rows,
    features,
    GROUPED: tl.constexpr,
    RANDOM: tl.constexpr,
    EXPERT: tl.constexpr,
    CLIPPING: tl.constexpr,
    TOP: tl.constexpr,
    ROTATE: tl.constexpr,
    PACKED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """result: products [16 * blocks, features]; or, PACKED, codes [8 * blocks, features], with scales [blocks, features]."""
    first, count, group = _block_of_rows(block_map, rows, GROUPED)
    block = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    if ROTATE != NOT:
        values = _load_rotated(x, first, count, column, features, rotation, ROTATE, WIDTH)
    else:
        values = _load(x, first, count, column, features)
    random = _random(
        bits, sample, position, expert, feature_blocks, key0, key1, step, first, count, column, features, RANDOM, EXPERT, WIDTH
    )
    x_block = tl.reshape(values, [1, 16, WIDTH])
    largest = tl.load(amax + group)
    code, scale, scaled = _quantize(x_block, tl.reshape(random, [1, 16, WIDTH]), largest, TOP, RANDOM, CLIPPING, False, 1, WIDTH)
    inside = (column < features)[None, :]
    if PACKED:
        codes = tl.reshape(_pack(code, scaled, 1, WIDTH), [8, WIDTH])
        tl.store(result + (block * 8 + tl.arange(0, 8))[:, None] * features + column[None, :], codes, mask=inside)
        tl.store(scales + block * features + column, tl.reshape(_scale_byte(scale), [WIDTH]), mask=column < features)
    else:
        products = tl.reshape(code * scale, [16, WIDTH]).to(result.dtype.element_ty)
        tl.store(result + (block * 16 + tl.arange(0, 16))[:, None] * features + column[None, :], products, mask=inside)


@triton.jit
def unpack_kernel(codes, scales, result, rows, features, COLUMNS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr):
    """result: products [rows, features] of packed codes."""
    BLOCKS: tl.constexpr = WIDTH // 16
    first = tl.program_id(0).to(tl.int64) * 16
    row = tl.arange(0, 16)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    if COLUMNS:
        inside = (column < features)[None, :]
        pairs = tl.load(codes + (first // 2 + tl.arange(0, 8))[:, None] * features + column[None, :], mask=inside, other=0).to(tl.int32)
        index = tl.reshape(tl.permute(tl.join(pairs & 15, pairs >> 4), (0, 2, 1)), [1, 16, WIDTH])
        byte = tl.reshape(tl.load(scales + first // 16 * features + column, mask=column < features, other=0), [1, 1, WIDTH]).to(tl.int32)
    else:
        blocks = tl.cdiv(features, 16)
        half = tl.program_id(1) * (WIDTH // 2) + tl.arange(0, WIDTH // 2)
        block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        present = (first + row < rows)[:, None]
        inside = present & (half < blocks * 8)[None, :]
        pairs = tl.load(codes + (first + row)[:, None] * (blocks * 8) + half[None, :], mask=inside, other=0).to(tl.int32)
        index = tl.reshape(tl.join(pairs & 15, pairs >> 4), [16 * BLOCKS, 16, 1])
        if TILES:
            scale_row = first // 16 + row * 0
        else:
            scale_row = first + row
        inside = present & (block < blocks)[None, :]
        byte = tl.load(scales + scale_row[:, None] * blocks + block[None, :], mask=inside, other=0).to(tl.int32)
        byte = tl.reshape(byte, [16 * BLOCKS, 1, 1])
    place = index & 7
    magnitude = tl.where(place <= 4, place * 0.5, tl.where(place <= 6, place - 2.0, 6.0))
    code = tl.where(index >= 8, -magnitude, magnitude)
    normal = ((byte & 0x7F) + 960 << 20).to(tl.float32, bitcast=True)
    scale = tl.where((byte & 0x7F) < 8, (byte & 0x7F).to(tl.float32) * 0.001953125, normal)
    scale = tl.where((byte & 0x7F) == 0x7F, float("nan"), scale)
    products = tl.reshape(code * scale, [16, WIDTH]).to(result.dtype.element_ty)
    inside = (first + row < rows)[:, None] & (column < features)[None, :]
    tl.store(result + (first + row)[:, None] * features + column[None, :], products, mask=inside)
