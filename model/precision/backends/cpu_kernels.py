"""NVFP4 on CPUs, compiled by Numba: one pass over memory where eager PyTorch takes twenty.

Why Numba: it installs with pip alone and brings its own compiler, so a machine without one gets the same speed; compiled kernels are cached
on disk (`python -m model.precision.backends.cpu` fills the cache; `make setup` does), so a fresh process only loads them. torch.compile and C++
extensions need a C++ compiler on the user's machine.

A tile of 16 rows x LANES columns is held in L1 as fp32 [16, lanes], element j of a block in row j, so that every step (rotation, block
amax, scale, rounding) is a loop over lanes that LLVM vectorises. Blocks along a row are read directly, 16 neighbours at a time.

The arithmetic is that of `model.precision.nvfp4`, operation by operation: Numba without fastmath neither reorders nor fuses. The rotation
alone uses fused multiply-adds in the order of k, as an fp32 GEMM does.

bf16 comes as uint16 (NumPy has no bf16); `widen` reads both.

All in one file: of what a compiled kernel calls, Numba notices changes in the kernel's own file only.
"""
# mypy: ignore-errors
# What Numba compiles is its own dialect: a kernel's types are those it is called with.

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

LANES = 128
FLT_MAX = np.float32(3.4028234663852886e38)
f32, i32, u8, u16, u32, u64 = np.float32, np.int32, np.uint8, np.uint16, np.uint32, np.uint64

# Numba widens int32 arithmetic to 64 bits, which halves the lanes of a vector; these stay in 32.


@intrinsic
def bits_of(typing, x):
    """The bits of an fp32 number, int32."""
    return types.int32(types.float32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def float_of(typing, bits):
    """The fp32 number of these bits."""
    return types.float32(types.int32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.FloatType())


def _integer(operation):
    def binary(typing, a, b):
        return types.int32(types.int32, types.int32), lambda context, builder, sig, args: getattr(builder, operation)(*args)

    return intrinsic(binary)


add, both, either, shift_left, shift_right = (_integer(name) for name in ("add", "and_", "or_", "shl", "lshr"))


@intrinsic
def fused(typing, a, b, c):
    """a * b + c, rounded once."""
    number = types.float32
    return number(number, number, number), lambda context, builder, sig, args: builder.fma(*args)


def kernel(function):
    return njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)(function)


def widen(value):
    """An element as fp32: fp32 itself, or the uint16 of a bf16."""
    raise AssertionError(value)


@overload(widen)
def _widen(value):
    if isinstance(value, types.Float):
        return lambda value: value
    return lambda value: float_of(shift_left(i32(value), i32(16)))


ABS, SIGN = i32(0x7FFFFFFF), i32(-0x80000000)
ONE, BINADE = i32(0x3F800000), i32(0x7F800000)
BF16, FP16 = 1, 2  # what rotated elements are rounded to; 0: they stay fp32

# -- one element -----------------------------------------------------------------------------------------------------------------------------


@kernel
def clamped(v):
    # Written so that NaN stays NaN.
    v = f32(6) if v > f32(6) else v
    return f32(-6) if v < f32(-6) else v


@kernel
def nearest(v):
    """E2M1, ties to even, of |v| <= 6: the addition of 1.5 * 2^23 grid steps rounds."""
    a = both(bits_of(v), ABS)
    a = ONE if a < ONE else a
    shift = float_of(both(a, BINADE)) * f32(0.75 * 2**23)
    return (v + shift) - shift


@kernel
def stochastic(v, byte):
    """E2M1: |v| moved up by byte/256 of a grid step, then floored to the grid."""
    sign, a = both(bits_of(v), SIGN), both(bits_of(v), ABS)
    at_least_one = ONE if a < ONE else a
    moved = (f32(byte) * f32(1 / 512)) * float_of(both(at_least_one, BINADE)) + float_of(a)
    floor = float_of(both(bits_of(moved), i32(-0x400000)))  # one bit of mantissa
    floor = f32(6) if floor > f32(6) else floor
    below_one = f32(0.5) if moved >= f32(0.5) else f32(0)
    floor = floor if not (moved < f32(1)) else below_one
    return float_of(either(bits_of(floor), sign))


@kernel
def to_nearest_bf16(v):
    b = bits_of(v)
    rounded = both(add(add(b, i32(0x7FFF)), both(shift_right(b, i32(16)), i32(1))), i32(-0x10000))
    return v if both(b, ABS) > BINADE else float_of(rounded)


@kernel
def to_nearest_fp16(v):
    b = bits_of(v)
    rounded = float_of(both(add(add(b, i32(0xFFF)), both(shift_right(b, i32(13)), i32(1))), i32(-0x2000)))
    # Below 2^-14 fp16 has steps of 2^-24: adding and subtracting 0.75 rounds to them.
    small = (v + f32(0.75)) - f32(0.75)
    magnitude = both(b, ABS)
    finite = small if magnitude < i32(0x38800000) else rounded
    large = f32(np.inf) if v > f32(0) else f32(-np.inf)
    finite = large if magnitude >= i32(0x477FF000) else finite  # 65520
    return v if magnitude > BINADE else finite


@kernel
def rounded(v, rounding):
    if rounding == BF16:
        return to_nearest_bf16(v)
    return to_nearest_fp16(v) if rounding == FP16 else v


@kernel
def e4m3(v):
    """E4M3, ties to even, saturating at 448, of v >= 0."""
    v = f32(448) if v > f32(448) else v
    b = bits_of(v)
    b = add(add(b, i32(0x7FFFF)), both(shift_right(b, i32(20)), i32(1)))
    normal = float_of(both(b, i32(-0x100000)))
    subnormal = (v + f32(1.5 * 2**14)) - f32(1.5 * 2**14)  # multiples of 2^-9
    return subnormal if v < f32(2**-6) else normal


@kernel
def e4m3_byte(v):
    """The byte of an E4M3 value v >= 0; NaN is 0x7f."""
    b = add(shift_right(bits_of(v), i32(20)), i32(-960))
    b = i32(127) if b > i32(127) else b
    return u8(v * f32(512)) if v < f32(2**-6) else u8(b)


@kernel
def from_e4m3_byte(byte):
    b = i32(byte)
    value = float_of(shift_left(add(b, i32(960)), i32(20)))
    value = float_of(i32(0x7FC00000)) if b == i32(127) else value
    return f32(b) * f32(1 / 512) if b < i32(8) else value


@kernel
def index_of(v):
    """The index of a magnitude on the grid, 0 ... 7."""
    a = both(bits_of(v), ABS)
    small = i32(1) if a > i32(0) else i32(0)
    return both(add(shift_right(a, i32(22)), i32(-252)), i32(7)) if a >= ONE else small


@kernel
def nibble(v, negative):
    return either(index_of(v), i32(8) if negative else i32(0))


@kernel
def from_nibble(code):
    index = both(code, i32(7))
    large = shift_left(add(index, i32(252)), i32(22))
    small = i32(0x3F000000) if index == i32(1) else i32(0)
    magnitude = small if index < i32(2) else large
    return float_of(either(magnitude, shift_left(both(code, i32(8)), i32(28))))


# -- scales ----------------------------------------------------------------------------------------------------------------------------------


@kernel
def global_scale(amax, bound):
    s = (f32(6) * bound) / amax
    s = FLT_MAX if s > FLT_MAX else s
    return f32(1) if amax == f32(0) or s == f32(0) else s


@kernel
def inverse(scale, decode):
    """enc: what an element of a block with this scale is multiplied with."""
    e = f32(1) / (scale * decode)
    return FLT_MAX if e > FLT_MAX else e


@kernel
def wanted_scale(largest, s, mult, clipping):
    """The scale of a block before it is rounded; 4over6 rounds in another place."""
    return (largest / f32(6)) * s if clipping else largest * mult


@kernel
def error_of(code, scale, amax, top, x, squared):
    """Of one element, for 4over6; top: 6 times the largest block scale."""
    d = ((code * scale) * amax) / top - x
    return d * d if squared else abs(d)


# -- random bytes ----------------------------------------------------------------------------------------------------------------------------


@kernel
def philox_round(c0, c1, c2, c3, k0, k1):
    """32-bit words in 64-bit numbers. Masked where they are multiplied: LLVM then sees that 32 bits by 32 are enough."""
    mask = u64(0xFFFFFFFF)
    p0, p1 = (c0 & mask) * u64(0xD2511F53), (c2 & mask) * u64(0xCD9E8D57)
    return (p1 >> u64(32)) ^ c1 ^ k0, p1 & mask, (p0 >> u64(32)) ^ c3 ^ k1, p0 & mask


@kernel
def random_words(words, n, features, positions, samples, step, k0, k1, drawn):
    """Philox 4x32-10 for n groups of 16 features of one token: words uint32 [>= n, 4]; see `model.precision.philox`.

    features, positions, samples: words 0, 1 and 2 of the n counters, uint32. drawn: four uint32 arrays to work in.
    """
    mask = u64(0xFFFFFFFF)
    # Four plain arrays first, then interleaved: a loop that interleaves at once is not vectorised.
    first, second, third, fourth = drawn
    for i in range(n):
        c0, c1, c2, c3, q0, q1 = u64(features[i]), u64(positions[i]), u64(samples[i]), step, k0, k1
        for _ in range(10):
            c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, q0, q1)
            q0, q1 = (q0 + u64(0x9E3779B9)) & mask, (q1 + u64(0xBB67AE85)) & mask
        first[i], second[i], third[i], fourth[i] = u32(c0), u32(c1), u32(c2), u32(c3)
    for i in range(n):
        words[i, 0], words[i, 1], words[i, 2], words[i, 3] = first[i], second[i], third[i], fourth[i]


# -- tiles of 16 rows: blocks run down the columns --------------------------------------------------------------------------------------------


@kernel
def load_tile(t, x, row, count, column, n):
    for j in range(count):
        source = x[row + j, column : column + n]  # a sum as an index would be checked for its sign, lane by lane
        for lane in range(n):
            t[j, lane] = widen(source[lane])
    for j in range(count, 16):
        for lane in range(n):
            t[j, lane] = f32(0)


@kernel
def eight_more(y, t, row, lane, f0, f1, f2, f3, f4, f5, f6, f7):
    """y + sum of eight elements of a column of t times their factors; in order, fused, as an fp32 GEMM takes them."""
    y = fused(t[row, lane], f0, y)
    y = fused(t[row + 1, lane], f1, y)
    y = fused(t[row + 2, lane], f2, y)
    y = fused(t[row + 3, lane], f3, y)
    y = fused(t[row + 4, lane], f4, y)
    y = fused(t[row + 5, lane], f5, y)
    y = fused(t[row + 6, lane], f6, y)
    return fused(t[row + 7, lane], f7, y)


@kernel
def rotate_tile(t, r, n, factors, rounding):
    """r = the rotation of t's columns by the transpose of factors, fp32 [16, 16]."""
    # Rows j and j + 8 of a Sylvester matrix begin with the same eight numbers, whatever the signs of its columns: so do their sums.
    below = r[8:]
    other = factors[8:]
    for j in range(8):
        # Names and no loops: what is loaded here stays in registers.
        f0 = factors[j, 0]
        f1 = factors[j, 1]
        f2 = factors[j, 2]
        f3 = factors[j, 3]
        f4 = factors[j, 4]
        f5 = factors[j, 5]
        f6 = factors[j, 6]
        f7 = factors[j, 7]
        g0 = factors[j, 8]
        g1 = factors[j, 9]
        g2 = factors[j, 10]
        g3 = factors[j, 11]
        g4 = factors[j, 12]
        g5 = factors[j, 13]
        g6 = factors[j, 14]
        g7 = factors[j, 15]
        h0 = other[j, 8]
        h1 = other[j, 9]
        h2 = other[j, 10]
        h3 = other[j, 11]
        h4 = other[j, 12]
        h5 = other[j, 13]
        h6 = other[j, 14]
        h7 = other[j, 15]
        for lane in range(n):
            shared = eight_more(f32(-0.0), t, 0, lane, f0, f1, f2, f3, f4, f5, f6, f7)  # -0 + x is x, also of -0
            r[j, lane] = eight_more(shared, t, 8, lane, g0, g1, g2, g3, g4, g5, g6, g7)
            below[j, lane] = eight_more(shared, t, 8, lane, h0, h1, h2, h3, h4, h5, h6, h7)
    if rounding == BF16:
        for j in range(16):
            for lane in range(n):
                r[j, lane] = to_nearest_bf16(r[j, lane])
    elif rounding == FP16:
        for j in range(16):
            for lane in range(n):
                r[j, lane] = to_nearest_fp16(r[j, lane])


@kernel
def tile_block_amax(t, n, m):
    """m[lane] = the bits of the largest magnitude of column `lane`; NaN is the largest."""
    for lane in range(n):
        m[lane] = i32(0)
    for j in range(16):
        for lane in range(n):
            b = both(bits_of(t[j, lane]), ABS)
            m[lane] = b if b > m[lane] else m[lane]


@kernel
def encode_tile(t, q, n, enc):
    for j in range(16):
        for lane in range(n):
            q[j, lane] = nearest(clamped(t[j, lane] * enc[lane]))


@kernel
def encode_tile_stochastic(t, q, n, enc, bits):
    for j in range(16):
        for lane in range(n):
            q[j, lane] = stochastic(clamped(t[j, lane] * enc[lane]), bits[j, lane])


@kernel
def tile_errors(t, q, n, scale, amax, top, squared, total):
    """total[lane]: the error of every block, one element after another."""
    for lane in range(n):
        total[lane] = f32(0)
    for j in range(16):
        for lane in range(n):
            total[lane] = total[lane] + error_of(q[j, lane], scale[lane], amax, top, t[j, lane], squared)


@kernel
def quantize_columns(
    x, first, last, starts, counts, groups, amax, bound, factors, rounding, clipping,
    noise, bits, feature_blocks, experts, positions, samples, step, k0, k1,
    packed, products, codes, scales,
):  # fmt: skip
    """Row blocks first ... last - 1: block i is rows starts[i] ... + counts[i] of x, of group groups[i].

    factors: fp32 [16, 16], transposed, of the rotation; empty: none. clipping: 0 saturate, 1 MAE, 2 MSE.
    noise: 0 none, 1 `bits` uint8 like x, 2 Philox.
    products fp32 [16 * blocks, features], or, packed, codes [8 * blocks, features] and scales [blocks, features].
    """
    features = x.shape[1]
    t, r = np.empty((16, LANES), np.float32), np.empty((16, LANES), np.float32)
    q, q4 = np.empty((16, LANES), np.float32), np.empty((16, LANES), np.float32)
    m, sf, enc = np.empty(LANES, np.int32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    sf4, enc4 = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    error6, error4 = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    calls = LANES // 16  # of Philox, for a row of a tile
    words = np.empty((16 * calls, 4), np.uint32)
    noise_tile = words.view(np.uint8).reshape(16, LANES)
    feature, position, sample = np.zeros(16 * calls, np.uint32), np.empty(16 * calls, np.uint32), np.empty(16 * calls, np.uint32)
    drawn = (
        np.empty(16 * calls, np.uint32),
        np.empty(16 * calls, np.uint32),
        np.empty(16 * calls, np.uint32),
        np.empty(16 * calls, np.uint32),
    )
    largest_value = f32(6) * bound
    for i in range(first, last):
        group_amax = amax[groups[i]]
        s = global_scale(group_amax, bound)
        mult, decode = s * f32(1 / 6), f32(1) / s
        if noise == 2:
            for j in range(counts[i]):
                for call in range(calls):
                    position[j * calls + call], sample[j * calls + call] = positions[starts[i] + j], samples[starts[i] + j]
        for column in range(0, features, LANES):
            n = min(LANES, features - column)
            load_tile(t, x, starts[i], counts[i], column, n)
            if len(factors):
                rotate_tile(t, r, n, factors, rounding)
                for j in range(16):
                    for lane in range(n):
                        t[j, lane] = r[j, lane]
            tile_block_amax(t, n, m)
            for lane in range(n):
                sf[lane] = e4m3(wanted_scale(float_of(m[lane]), s, mult, clipping))
                enc[lane] = inverse(sf[lane], decode)
            if noise == 0:
                encode_tile(t, q, n, enc)
            else:
                if noise == 1:
                    for j in range(counts[i]):
                        given = bits[starts[i] + j, column : column + n]
                        for lane in range(n):
                            noise_tile[j, lane] = given[lane]
                else:
                    here = feature_blocks[column // 16 : column // 16 + (n + 15) // 16]
                    for j in range(counts[i]):
                        expert = experts[starts[i] + j]
                        for call in range(len(here)):
                            feature[j * calls + call] = here[call] | expert
                    random_words(words, counts[i] * calls, feature, position, sample, step, k0, k1, drawn)
                for j in range(counts[i], 16):  # rows of padding, which the rotation fills
                    for lane in range(n):
                        noise_tile[j, lane] = u8(0)
                encode_tile_stochastic(t, q, n, enc, noise_tile)
            if clipping:
                for lane in range(n):
                    sf4[lane] = e4m3(wanted_scale(float_of(m[lane]), s, mult, clipping) * f32(1.5))
                    enc4[lane] = inverse(sf4[lane], decode)
                encode_tile(t, q4, n, enc4)
                tile_errors(t, q, n, sf, group_amax, largest_value, clipping == 2, error6)
                tile_errors(t, q4, n, sf4, group_amax, largest_value, clipping == 2, error4)
                for lane in range(n):
                    if error4[lane] < error6[lane]:
                        sf[lane] = sf4[lane]
                        enc[lane] = enc4[lane]
                        for j in range(16):
                            q[j, lane] = q4[j, lane]
            if packed:
                for p in range(8):
                    pair, low, high = codes[8 * i + p, column : column + n], 2 * p, 2 * p + 1
                    for lane in range(n):
                        even = nibble(q[low, lane], t[low, lane] * enc[lane] < f32(0))
                        odd = nibble(q[high, lane], t[high, lane] * enc[lane] < f32(0))
                        pair[lane] = u8(either(even, shift_left(odd, i32(4))))
                of_block = scales[i, column : column + n]
                for lane in range(n):
                    of_block[lane] = e4m3_byte(sf[lane])
            else:
                for j in range(16):
                    target = products[16 * i + j, column : column + n]
                    for lane in range(n):
                        target[lane] = q[j, lane] * sf[lane]


@kernel
def columns_amax(x, first, last, starts, counts, groups, factors, rounding, largest):
    """largest[g] = bits of the largest magnitude of group g over these row blocks, after the rotation."""
    t, r = np.empty((16, LANES), np.float32), np.empty((16, LANES), np.float32)
    m, total = np.empty(LANES, np.int32), np.empty(LANES, np.float32)
    for i in range(first, last):
        top = largest[groups[i]]
        for column in range(0, x.shape[1], LANES):
            n = min(LANES, x.shape[1] - column)
            load_tile(t, x, starts[i], counts[i], column, n)
            # No rotated element exceeds a quarter of the sum of magnitudes (and what sixteen roundings add): most tiles need no rotation.
            for lane in range(n):
                total[lane] = f32(0)
            for j in range(16):
                for lane in range(n):
                    total[lane] = total[lane] + abs(t[j, lane])
            most = i32(0)
            for lane in range(n):
                b = both(bits_of(total[lane]), ABS)
                most = b if b > most else most
            if float_of(most) * f32(0.25001) < float_of(top):  # not where either is NaN
                continue
            rotate_tile(t, r, n, factors, 0)
            tile_block_amax(r, n, m)
            for lane in range(n):
                top = m[lane] if m[lane] > top else top
        largest[groups[i]] = top
    for group in range(len(largest)):
        # Rounding keeps the order of magnitudes: the largest one rounded is the largest of the rounded.
        largest[group] = bits_of(rounded(float_of(largest[group]), rounding))


# -- rows: blocks run along a row, or are tiles --------------------------------------------------------------------------------------------------


@kernel
def load_row(row, x, factors, rounding):
    """row fp32 [blocks, 16] = x, rotated by factors fp32 [16, 16] unless those are empty."""
    flat, source = row.reshape(-1), x.reshape(-1)
    for i in range(len(flat)):
        flat[i] = widen(source[i])
    if len(factors) == 0:
        return
    for block in range(len(x)):
        x0 = row[block, 0]
        x1 = row[block, 1]
        x2 = row[block, 2]
        x3 = row[block, 3]
        x4 = row[block, 4]
        x5 = row[block, 5]
        x6 = row[block, 6]
        x7 = row[block, 7]
        x8 = row[block, 8]
        x9 = row[block, 9]
        x10 = row[block, 10]
        x11 = row[block, 11]
        x12 = row[block, 12]
        x13 = row[block, 13]
        x14 = row[block, 14]
        x15 = row[block, 15]
        for j in range(16):
            y = x0 * factors[0, j]
            y = fused(x1, factors[1, j], y)
            y = fused(x2, factors[2, j], y)
            y = fused(x3, factors[3, j], y)
            y = fused(x4, factors[4, j], y)
            y = fused(x5, factors[5, j], y)
            y = fused(x6, factors[6, j], y)
            y = fused(x7, factors[7, j], y)
            y = fused(x8, factors[8, j], y)
            y = fused(x9, factors[9, j], y)
            y = fused(x10, factors[10, j], y)
            y = fused(x11, factors[11, j], y)
            y = fused(x12, factors[12, j], y)
            y = fused(x13, factors[13, j], y)
            y = fused(x14, factors[14, j], y)
            y = fused(x15, factors[15, j], y)
            row[block, j] = y
    if rounding == BF16:
        for i in range(len(flat)):
            flat[i] = to_nearest_bf16(flat[i])
    elif rounding == FP16:
        for i in range(len(flat)):
            flat[i] = to_nearest_fp16(flat[i])


@kernel
def row_amax(x, first, last, factors, rounding, largest):
    """largest[row] = bits of the largest magnitude of a row of x [rows, blocks, 16], rotated as by `load_row`."""
    loaded = np.empty((x.shape[1], 16), np.float32)
    for row in range(first, last):
        top = i32(0)
        if len(factors) == 0:
            source = x[row].reshape(-1)
            for column in range(len(source)):
                b = both(bits_of(widen(source[column])), ABS)
                top = b if b > top else top
        else:
            load_row(loaded, x[row], factors, rounding)
            for block in range(len(loaded)):
                for j in range(16):
                    b = both(bits_of(loaded[block, j]), ABS)
                    top = b if b > top else top
        largest[row] = top


@kernel
def block_error(block, code, scale, amax, top, squared):
    """One element after another."""
    total = f32(0)
    for j in range(16):
        total = total + error_of(code[j], scale, amax, top, block[j], squared)
    return total


@kernel
def join_nibbles(pairs, codes):
    """codes uint8 [n]: two codes a byte, of pairs uint16 [n]: two codes a byte each, the even one first."""
    for p in range(len(codes)):
        codes[p] = u8((pairs[p] & 0xF) | (pairs[p] >> 4))


@kernel
def split_nibbles(codes, pairs):
    for p in range(len(codes)):
        pairs[p] = (u16(codes[p]) & 0xF) | ((u16(codes[p]) & 0xF0) << 4)


@kernel
def quantize_rows(
    x, first, last, groups, amax, bound, factors, rounding, clipping,
    noise, bits, feature_blocks, experts, positions, samples, step, k0, k1,
    packed, products, codes, scales,
):  # fmt: skip
    """Rows first ... last - 1 of x [rows, blocks, 16]; row i is of group groups[i]. factors: as `load_row`. bits, products like x;
    codes [rows, 8 * blocks], scales [rows, blocks]. Else as `quantize_columns`."""
    blocks = x.shape[1]
    m, sf, enc = np.empty(blocks, np.int32), np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    v, q, q4 = np.empty(16, np.float32), np.empty(16, np.float32), np.empty(16, np.float32)
    batch = max(1, 128 // blocks)  # rows whose random bytes are drawn at once
    words = np.empty((batch * blocks, 4), np.uint32)
    noise_rows = words.view(np.uint8)
    feature, position, sample = (
        np.empty(batch * blocks, np.uint32),
        np.empty(batch * blocks, np.uint32),
        np.empty(batch * blocks, np.uint32),
    )
    drawn = (
        np.empty(batch * blocks, np.uint32), np.empty(batch * blocks, np.uint32),
        np.empty(batch * blocks, np.uint32), np.empty(batch * blocks, np.uint32),
    )  # fmt: skip
    pairs = np.empty(8 * blocks, np.uint16)
    nibbles = pairs.view(np.uint8).reshape(blocks, 16)
    loaded = np.empty((blocks, 16), np.float32)
    largest_value = f32(6) * bound
    for row in range(first, last):
        load_row(loaded, x[row], factors, rounding)
        group_amax = amax[groups[row]]
        s = global_scale(group_amax, bound)
        mult, decode = s * f32(1 / 6), f32(1) / s
        for block in range(blocks):
            top = i32(0)
            for j in range(16):
                b = both(bits_of(loaded[block, j]), ABS)
                top = b if b > top else top
            m[block] = top
        for block in range(blocks):
            sf[block] = e4m3(wanted_scale(float_of(m[block]), s, mult, clipping))
            enc[block] = inverse(sf[block], decode)
        if clipping:
            for block in range(blocks):
                scale4 = e4m3(wanted_scale(float_of(m[block]), s, mult, clipping) * f32(1.5))
                e4 = inverse(scale4, decode)
                for j in range(16):
                    v[j] = loaded[block, j]
                    q[j] = nearest(clamped(v[j] * enc[block]))
                    q4[j] = nearest(clamped(v[j] * e4))
                squared = clipping == 2
                if block_error(v, q4, scale4, group_amax, largest_value, squared) < block_error(
                    v, q, sf[block], group_amax, largest_value, squared
                ):
                    sf[block] = scale4
                    enc[block] = e4
        at = (row - first) % batch if noise == 2 else 0
        noise_row = noise_rows[at * blocks : at * blocks + blocks]
        if noise == 1:
            noise_row[:] = bits[row]
        elif noise == 2 and at == 0:
            ahead = min(batch, last - row)
            for i in range(ahead):
                for block in range(blocks):
                    feature[i * blocks + block] = feature_blocks[block] | experts[row + i]
                    position[i * blocks + block], sample[i * blocks + block] = positions[row + i], samples[row + i]
            random_words(words, ahead * blocks, feature, position, sample, step, k0, k1, drawn)
        if packed:
            for block in range(blocks):
                e = enc[block]
                if noise == 0:
                    for j in range(16):
                        scaled = clamped(loaded[block, j] * e)
                        nibbles[block, j] = u8(nibble(nearest(scaled), scaled < f32(0)))
                else:
                    for j in range(16):
                        scaled = clamped(loaded[block, j] * e)
                        nibbles[block, j] = u8(nibble(stochastic(scaled, noise_row[block, j]), scaled < f32(0)))
            join_nibbles(pairs, codes[row])
            for block in range(blocks):
                scales[row, block] = e4m3_byte(sf[block])
        elif noise == 0:
            for block in range(blocks):
                e, scale = enc[block], sf[block]
                for j in range(16):
                    products[row, block, j] = nearest(clamped(loaded[block, j] * e)) * scale
        else:
            for block in range(blocks):
                e, scale = enc[block], sf[block]
                for j in range(16):
                    products[row, block, j] = stochastic(clamped(loaded[block, j] * e), noise_row[block, j]) * scale


@kernel
def quantize_tiles(x, first, last, groups, amax, bound, clipping, packed, products, codes, scales):
    """Bands first ... last - 1 of 16 rows of x [rows, blocks, 16], in tiles of 16 x 16; scales [bands, blocks]. groups: of each band."""
    blocks = x.shape[1]
    top = np.empty((blocks, 16), np.int32)
    v, q, q4 = np.empty(16, np.float32), np.empty(16, np.float32), np.empty(16, np.float32)
    e6, e4 = np.empty(16, np.float32), np.empty(16, np.float32)
    m, sf, enc = np.empty(blocks, np.int32), np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    pairs = np.empty(8 * blocks, np.uint16)
    nibbles = pairs.view(np.uint8).reshape(blocks, 16)
    largest_value = f32(6) * bound
    for band in range(first, last):
        group_amax = amax[groups[band]]
        s = global_scale(group_amax, bound)
        mult, decode = s * f32(1 / 6), f32(1) / s
        top[:] = 0
        for row in range(16 * band, 16 * band + 16):
            for block in range(blocks):
                for j in range(16):
                    b = both(bits_of(widen(x[row, block, j])), ABS)
                    top[block, j] = b if b > top[block, j] else top[block, j]
        for block in range(blocks):
            largest = i32(0)
            for j in range(16):
                largest = top[block, j] if top[block, j] > largest else largest
            m[block] = largest
        for block in range(blocks):
            sf[block] = e4m3(wanted_scale(float_of(m[block]), s, mult, clipping))
            enc[block] = inverse(sf[block], decode)
        if clipping:
            squared = clipping == 2
            for block in range(blocks):
                scale4 = e4m3(wanted_scale(float_of(m[block]), s, mult, clipping) * f32(1.5))
                enc4 = inverse(scale4, decode)
                for i in range(16):
                    for j in range(16):
                        v[j] = widen(x[16 * band + i, block, j])
                        q[j] = nearest(clamped(v[j] * enc[block]))
                        q4[j] = nearest(clamped(v[j] * enc4))
                    e6[i] = block_error(v, q, sf[block], group_amax, largest_value, squared)
                    e4[i] = block_error(v, q4, scale4, group_amax, largest_value, squared)
                for half in (8, 4, 2, 1):
                    for j in range(half):
                        e6[j] = e6[j] + e6[j + half]
                        e4[j] = e4[j] + e4[j + half]
                if e4[0] < e6[0]:
                    sf[block] = scale4
                    enc[block] = enc4
        if packed:
            for block in range(blocks):
                scales[band, block] = e4m3_byte(sf[block])
        for row in range(16 * band, 16 * band + 16):
            if packed:
                for block in range(blocks):
                    e = enc[block]
                    for j in range(16):
                        scaled = clamped(widen(x[row, block, j]) * e)
                        nibbles[block, j] = u8(nibble(nearest(scaled), scaled < f32(0)))
                join_nibbles(pairs, codes[row])
            else:
                for block in range(blocks):
                    e, scale = enc[block], sf[block]
                    for j in range(16):
                        products[row, block, j] = nearest(clamped(widen(x[row, block, j]) * e)) * scale


@kernel
def round_to_bf16(x, first, last, result):
    """Elements first ... last - 1 of x [n], rounded to bf16 and kept as fp32."""
    source, target = x[first:last], result[first:last]
    for i in range(len(source)):
        target[i] = to_nearest_bf16(source[i])


# -- back to products ----------------------------------------------------------------------------------------------------------------------------


@kernel
def unpack_rows(codes, scales, rows_per_scale, first, last, products):
    """products [rows, 16 * blocks] of codes [rows, 8 * blocks]."""
    blocks = scales.shape[1]
    pairs = np.empty(8 * blocks, np.uint16)
    nibbles = pairs.view(np.uint8)
    scale = np.empty(16 * blocks, np.float32)
    by_block = scale.reshape(blocks, 16)
    for row in range(first, last):
        if row == first or row % rows_per_scale == 0:
            of_row = scales[row // rows_per_scale]
            for block in range(blocks):
                for j in range(16):
                    by_block[block, j] = from_e4m3_byte(of_row[block])
        split_nibbles(codes[row], pairs)
        target = products[row]
        for i in range(len(nibbles)):
            target[i] = from_nibble(i32(nibbles[i])) * scale[i]


@kernel
def unpack_columns(codes, scales, first, last, products):
    """Row blocks first ... last - 1."""
    features = codes.shape[1]
    scale = np.empty(features, np.float32)
    for i in range(first, last):
        for column in range(features):
            scale[column] = from_e4m3_byte(scales[i, column])
        for p in range(8):
            pair, even, odd = codes[8 * i + p], products[16 * i + 2 * p], products[16 * i + 2 * p + 1]
            for column in range(features):
                byte = i32(pair[column])
                even[column] = from_nibble(byte) * scale[column]
                odd[column] = from_nibble(shift_right(byte, i32(4))) * scale[column]
