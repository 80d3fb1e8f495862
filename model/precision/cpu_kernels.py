"""NVFP4 on CPUs, compiled by Numba: one pass over memory where eager PyTorch takes twenty.

Why Numba: it installs with pip alone and brings its own compiler, so a machine without one gets the same speed; compiled kernels are cached
on disk (`python -m model.precision.cpu` fills the cache; `make setup` does), so a fresh process only loads them. torch.compile and C++
extensions need a C++ compiler on the user's machine.

A tile of 16 rows x LANES columns is held in L1 as fp32 [16, lanes], element j of a block in row j, so that every step (rotation, block
amax, scale, rounding) is a loop over lanes that LLVM vectorises. Blocks along a row are read directly, 16 neighbours at a time.

The arithmetic is that of `model.precision.nvfp4`, operation by operation: Numba without fastmath neither reorders nor fuses. The rotation
alone uses fused multiply-adds in the order of k, as an fp32 GEMM does.

bf16 comes as uint16 (NumPy has no bf16); `widen` reads both.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

LANES = 128
FLT_MAX = np.float32(3.4028234663852886e38)
f32, i32, u8, u32, u64 = np.float32, np.int32, np.uint8, np.uint32, np.uint64
SIGNS = np.array([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1], dtype=np.float32)

# Numba widens int32 arithmetic to 64 bits, which halves the lanes of a vector; these stay in 32.


@intrinsic
def bits_of(typing, x):  # type: ignore[no-untyped-def]
    """The bits of an fp32 number, int32."""
    return types.int32(types.float32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def float_of(typing, bits):  # type: ignore[no-untyped-def]
    """The fp32 number of these bits."""
    return types.float32(types.int32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.FloatType())


def _integer(operation):  # type: ignore[no-untyped-def]
    def binary(typing, a, b):  # type: ignore[no-untyped-def]
        return types.int32(types.int32, types.int32), lambda context, builder, sig, args: getattr(builder, operation)(*args)

    return intrinsic(binary)


add, both, either, shift_left, shift_right = (_integer(name) for name in ("add", "and_", "or_", "shl", "lshr"))


@intrinsic
def fused(typing, a, b, c):  # type: ignore[no-untyped-def]
    """a * b + c, rounded once."""
    number = types.float32
    return number(number, number, number), lambda context, builder, sig, args: builder.fma(*args)


def kernel(function):  # type: ignore[no-untyped-def]
    return njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)(function)


def widen(value):  # type: ignore[no-untyped-def]
    """An element as fp32: fp32 itself, or the uint16 of a bf16."""
    raise AssertionError(value)


@overload(widen)
def _widen(value):  # type: ignore[no-untyped-def]
    if isinstance(value, types.Float):
        return lambda value: value
    return lambda value: float_of(shift_left(i32(value), i32(16)))


ABS, SIGN = i32(0x7FFFFFFF), i32(-0x80000000)
ONE, BINADE = i32(0x3F800000), i32(0x7F800000)

# -- one element -----------------------------------------------------------------------------------------------------------------------------


@kernel
def clamped(v):  # type: ignore[no-untyped-def]
    # Written so that NaN stays NaN.
    v = f32(6) if v > f32(6) else v
    return f32(-6) if v < f32(-6) else v


@kernel
def nearest(v):  # type: ignore[no-untyped-def]
    """E2M1, ties to even, of |v| <= 6: the addition of 1.5 * 2^23 grid steps rounds."""
    a = both(bits_of(v), ABS)
    a = ONE if a < ONE else a
    shift = float_of(both(a, BINADE)) * f32(0.75 * 2**23)
    return (v + shift) - shift


@kernel
def stochastic(v, byte):  # type: ignore[no-untyped-def]
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
def e4m3(v):  # type: ignore[no-untyped-def]
    """E4M3, ties to even, saturating at 448, of v >= 0."""
    v = f32(448) if v > f32(448) else v
    b = bits_of(v)
    b = add(add(b, i32(0x7FFFF)), both(shift_right(b, i32(20)), i32(1)))
    normal = float_of(both(b, i32(-0x100000)))
    subnormal = (v + f32(1.5 * 2**14)) - f32(1.5 * 2**14)  # multiples of 2^-9
    return subnormal if v < f32(2**-6) else normal


@kernel
def e4m3_byte(v):  # type: ignore[no-untyped-def]
    """The byte of an E4M3 value v >= 0; NaN is 0x7f."""
    b = add(shift_right(bits_of(v), i32(20)), i32(-960))
    b = i32(127) if b > i32(127) else b
    return u8(v * f32(512)) if v < f32(2**-6) else u8(b)


@kernel
def from_e4m3_byte(byte):  # type: ignore[no-untyped-def]
    b = i32(byte)
    value = float_of(shift_left(add(b, i32(960)), i32(20)))
    value = float_of(i32(0x7FC00000)) if b == i32(127) else value
    return f32(b) * f32(1 / 512) if b < i32(8) else value


@kernel
def index_of(v):  # type: ignore[no-untyped-def]
    """The index of a magnitude on the grid, 0 ... 7."""
    a = both(bits_of(v), ABS)
    small = i32(1) if a > i32(0) else i32(0)
    return both(add(shift_right(a, i32(22)), i32(-252)), i32(7)) if a >= ONE else small


@kernel
def nibble(v, negative):  # type: ignore[no-untyped-def]
    return either(index_of(v), i32(8) if negative else i32(0))


@kernel
def from_nibble(code):  # type: ignore[no-untyped-def]
    index = both(code, i32(7))
    large = shift_left(add(index, i32(252)), i32(22))
    small = i32(0x3F000000) if index == i32(1) else i32(0)
    magnitude = small if index < i32(2) else large
    return float_of(either(magnitude, shift_left(both(code, i32(8)), i32(28))))


# -- scales ----------------------------------------------------------------------------------------------------------------------------------


@kernel
def global_scale(amax, bound):  # type: ignore[no-untyped-def]
    s = (f32(6) * bound) / amax
    s = FLT_MAX if s > FLT_MAX else s
    return f32(1) if amax == f32(0) or s == f32(0) else s


@kernel
def inverse(scale, decode):  # type: ignore[no-untyped-def]
    """enc: what an element of a block with this scale is multiplied with."""
    e = f32(1) / (scale * decode)
    return FLT_MAX if e > FLT_MAX else e


@kernel
def error_of(code, scale, amax, unit, x, squared):  # type: ignore[no-untyped-def]
    """Of one element, for 4over6."""
    d = code * ((scale * amax) * unit) - x
    return d * d if squared else abs(d)


# -- random bytes ----------------------------------------------------------------------------------------------------------------------------


@kernel
def random_words(words, n, blocks, expert, position, sample, step, k0, k1):  # type: ignore[no-untyped-def]
    """Philox 4x32-10 for n groups of 16 features of one token: words uint32 [>= n, 4]; see `model.precision.philox`."""
    mask = u64(0xFFFFFFFF)
    for b in range(n):
        c0, c1, c2, c3 = u64(blocks[b]) | expert, position, sample, step
        q0, q1 = k0, k1
        for _ in range(10):
            p0, p1 = c0 * u64(0xD2511F53), c2 * u64(0xCD9E8D57)
            c0, c1, c2, c3 = (p1 >> u64(32)) ^ c1 ^ q0, p1 & mask, (p0 >> u64(32)) ^ c3 ^ q1, p0 & mask
            q0, q1 = (q0 + u64(0x9E3779B9)) & mask, (q1 + u64(0xBB67AE85)) & mask
        words[b, 0], words[b, 1], words[b, 2], words[b, 3] = u32(c0), u32(c1), u32(c2), u32(c3)


# -- tiles of 16 rows: blocks run down the columns --------------------------------------------------------------------------------------------


@kernel
def load_tile(t, x, row, count, column, n):  # type: ignore[no-untyped-def]
    for j in range(count):
        for lane in range(n):
            t[j, lane] = widen(x[row + j, column + lane])
    for j in range(count, 16):
        for lane in range(n):
            t[j, lane] = f32(0)


@kernel
def rotate_tile(t, r, n, signs, to_bf16):  # type: ignore[no-untyped-def]
    """r = the rotation of t's columns: sums over k in order, fused, as an fp32 GEMM takes them. signs: fp32 [16]."""
    for j in range(16):
        for lane in range(n):
            r[j, lane] = f32(0)
        for k in range(16):
            ones = j & k
            ones ^= ones >> 2
            ones ^= ones >> 1
            factor = f32(-0.25) * signs[k] if ones & 1 else f32(0.25) * signs[k]
            for lane in range(n):
                r[j, lane] = fused(t[k, lane], factor, r[j, lane])
    if to_bf16:
        for j in range(16):
            for lane in range(n):
                b = bits_of(r[j, lane])
                rounded = both(add(add(b, i32(0x7FFF)), both(shift_right(b, i32(16)), i32(1))), i32(-0x10000))
                r[j, lane] = r[j, lane] if both(b, ABS) > BINADE else float_of(rounded)


@kernel
def tile_block_amax(t, n, m):  # type: ignore[no-untyped-def]
    """m[lane] = the bits of the largest magnitude of column `lane`; NaN is the largest."""
    for lane in range(n):
        m[lane] = i32(0)
    for j in range(16):
        for lane in range(n):
            b = both(bits_of(t[j, lane]), ABS)
            m[lane] = b if b > m[lane] else m[lane]


@kernel
def encode_tile(t, q, n, enc):  # type: ignore[no-untyped-def]
    for j in range(16):
        for lane in range(n):
            q[j, lane] = nearest(clamped(t[j, lane] * enc[lane]))


@kernel
def encode_tile_stochastic(t, q, n, enc, bits):  # type: ignore[no-untyped-def]
    for j in range(16):
        for lane in range(n):
            q[j, lane] = stochastic(clamped(t[j, lane] * enc[lane]), bits[j, lane])


@kernel
def tile_errors(t, q, n, scale, amax, unit, squared, total):  # type: ignore[no-untyped-def]
    """total[lane]: the error of every block, halves added to halves."""
    e = np.empty(16, np.float32)
    for lane in range(n):
        for j in range(16):
            e[j] = error_of(q[j, lane], scale[lane], amax, unit, t[j, lane], squared)
        for half in (8, 4, 2, 1):
            for j in range(half):
                e[j] = e[j] + e[j + half]
        total[lane] = e[0]


@kernel
def quantize_columns(  # type: ignore[no-untyped-def]
    x, first, last, starts, counts, groups, amax, bound, signs, to_bf16, clipping,
    noise, bits, feature_blocks, experts, positions, samples, step, k0, k1,
    packed, products, codes, scales,
):  # fmt: skip
    """Row blocks first ... last - 1: block i is rows starts[i] ... + counts[i] of x, of group groups[i].

    signs: fp32 [16] of the rotation, empty: none. clipping: 0 saturate, 1 MAE, 2 MSE. noise: 0 none, 1 `bits` uint8 like x, 2 Philox.
    products fp32 [16 * blocks, features], or, packed, codes [8 * blocks, features] and scales [blocks, features].
    """
    features = x.shape[1]
    t, r = np.empty((16, LANES), np.float32), np.empty((16, LANES), np.float32)
    q, q4 = np.empty((16, LANES), np.float32), np.empty((16, LANES), np.float32)
    m, sf, enc = np.empty(LANES, np.int32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    sf4, enc4 = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    error6, error4 = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    words = np.empty((16, LANES // 16, 4), np.uint32)
    noise_tile = words.view(np.uint8).reshape(16, LANES)
    unit = f32(1.0 / (6.0 * bound))
    for i in range(first, last):
        group_amax = amax[groups[i]]
        s = global_scale(group_amax, bound)
        mult, decode = s * f32(1 / 6), f32(1) / s
        for column in range(0, features, LANES):
            n = min(LANES, features - column)
            load_tile(t, x, starts[i], counts[i], column, n)
            if len(signs):
                rotate_tile(t, r, n, signs, to_bf16)
                t, r = r, t
            tile_block_amax(t, n, m)
            for lane in range(n):
                sf[lane] = e4m3(float_of(m[lane]) * mult)
                enc[lane] = inverse(sf[lane], decode)
            if noise == 0:
                encode_tile(t, q, n, enc)
            else:
                for j in range(counts[i]):
                    row = starts[i] + j
                    if noise == 1:
                        for lane in range(n):
                            noise_tile[j, lane] = bits[row, column + lane]
                    else:
                        random_words(
                            words[j], (n + 15) // 16, feature_blocks[column // 16 :], experts[row], positions[row], samples[row], step, k0, k1
                        )  # fmt: skip
                for j in range(counts[i], 16):  # rows of padding, which the rotation fills
                    for lane in range(n):
                        noise_tile[j, lane] = u8(0)
                encode_tile_stochastic(t, q, n, enc, noise_tile)
            if clipping:
                for lane in range(n):
                    sf4[lane] = e4m3((float_of(m[lane]) * mult) * f32(1.5))
                    enc4[lane] = inverse(sf4[lane], decode)
                encode_tile(t, q4, n, enc4)
                tile_errors(t, q, n, sf, group_amax, unit, clipping == 2, error6)
                tile_errors(t, q4, n, sf4, group_amax, unit, clipping == 2, error4)
                for lane in range(n):
                    if error4[lane] < error6[lane]:
                        sf[lane] = sf4[lane]
                        for j in range(16):
                            q[j, lane] = q4[j, lane]
            if packed:
                for p in range(8):
                    for lane in range(n):
                        low = nibble(q[2 * p, lane], t[2 * p, lane] < f32(0))
                        high = nibble(q[2 * p + 1, lane], t[2 * p + 1, lane] < f32(0))
                        codes[8 * i + p, column + lane] = u8(either(low, shift_left(high, i32(4))))
                for lane in range(n):
                    scales[i, column + lane] = e4m3_byte(sf[lane])
            else:
                for j in range(16):
                    for lane in range(n):
                        products[16 * i + j, column + lane] = q[j, lane] * sf[lane]


@kernel
def columns_amax(x, first, last, starts, counts, groups, signs, to_bf16, largest):  # type: ignore[no-untyped-def]
    """largest[g] = bits of the largest magnitude of group g over these row blocks, after the rotation."""
    t, r = np.empty((16, LANES), np.float32), np.empty((16, LANES), np.float32)
    m = np.empty(LANES, np.int32)
    for i in range(first, last):
        top = largest[groups[i]]
        for column in range(0, x.shape[1], LANES):
            n = min(LANES, x.shape[1] - column)
            load_tile(t, x, starts[i], counts[i], column, n)
            rotate_tile(t, r, n, signs, to_bf16)
            tile_block_amax(r, n, m)
            for lane in range(n):
                top = m[lane] if m[lane] > top else top
        largest[groups[i]] = top


@kernel
def rotate_rows(x, first, last, signs, out):  # type: ignore[no-untyped-def]
    """out fp32 = every 16 neighbours of a row rotated; features a multiple of 16."""
    t, r = np.empty((16, LANES), np.float32), np.empty((16, LANES), np.float32)
    blocks = x.shape[1] // 16
    for row in range(first, last):
        for start in range(0, blocks, LANES):
            n = min(LANES, blocks - start)
            for lane in range(n):
                for j in range(16):
                    t[j, lane] = widen(x[row, 16 * (start + lane) + j])
            rotate_tile(t, r, n, signs, False)
            for lane in range(n):
                for j in range(16):
                    out[row, 16 * (start + lane) + j] = r[j, lane]


# -- rows: blocks run along a row, or are tiles --------------------------------------------------------------------------------------------------


@kernel
def row_amax(x, first, last, largest):  # type: ignore[no-untyped-def]
    """largest[row] = bits of the largest magnitude of a row."""
    for row in range(first, last):
        top = i32(0)
        for column in range(x.shape[1]):
            b = both(bits_of(widen(x[row, column])), ABS)
            top = b if b > top else top
        largest[row] = top


@kernel
def block_error(block, code, scale, amax, unit, squared):  # type: ignore[no-untyped-def]
    e = np.empty(16, np.float32)
    for j in range(16):
        e[j] = error_of(code[j], scale, amax, unit, block[j], squared)
    for half in (8, 4, 2, 1):
        for j in range(half):
            e[j] = e[j] + e[j + half]
    return e[0]


@kernel
def store_codes(codes, row, block, x, q):  # type: ignore[no-untyped-def]
    for p in range(8):
        low, high = nibble(q[2 * p], x[2 * p] < f32(0)), nibble(q[2 * p + 1], x[2 * p + 1] < f32(0))
        codes[row, 8 * block + p] = u8(either(low, shift_left(high, i32(4))))


@kernel
def quantize_rows(  # type: ignore[no-untyped-def]
    x, first, last, groups, amax, bound, clipping,
    noise, bits, feature_blocks, experts, positions, samples, step, k0, k1,
    packed, products, codes, scales,
):  # fmt: skip
    """Rows first ... last - 1 of x, whose features are a multiple of 16; row i is of group groups[i]. Else as `quantize_columns`."""
    blocks = x.shape[1] // 16
    m, sf, enc = np.empty(blocks, np.int32), np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    v, q, q4 = np.empty(16, np.float32), np.empty(16, np.float32), np.empty(16, np.float32)
    words = np.empty((blocks, 4), np.uint32)
    noise_row = words.view(np.uint8).reshape(16 * blocks)
    unit = f32(1.0 / (6.0 * bound))
    for row in range(first, last):
        group_amax = amax[groups[row]]
        s = global_scale(group_amax, bound)
        mult, decode = s * f32(1 / 6), f32(1) / s
        for block in range(blocks):
            top = i32(0)
            for j in range(16):
                b = both(bits_of(widen(x[row, 16 * block + j])), ABS)
                top = b if b > top else top
            m[block] = top
        for block in range(blocks):
            sf[block] = e4m3(float_of(m[block]) * mult)
            enc[block] = inverse(sf[block], decode)
        if noise == 1:
            for column in range(16 * blocks):
                noise_row[column] = bits[row, column]
        elif noise == 2:
            random_words(words, blocks, feature_blocks, experts[row], positions[row], samples[row], step, k0, k1)
        if noise == 0 and clipping == 0 and not packed:
            for block in range(blocks):
                e, scale = enc[block], sf[block]
                for j in range(16):
                    products[row, 16 * block + j] = nearest(clamped(widen(x[row, 16 * block + j]) * e)) * scale
            continue
        if noise > 0 and not packed:
            for block in range(blocks):
                e, scale = enc[block], sf[block]
                for j in range(16):
                    at = 16 * block + j
                    products[row, at] = stochastic(clamped(widen(x[row, at]) * e), noise_row[at]) * scale
            continue
        for block in range(blocks):
            e, scale = enc[block], sf[block]
            for j in range(16):
                v[j] = widen(x[row, 16 * block + j])
            if noise == 0:
                for j in range(16):
                    q[j] = nearest(clamped(v[j] * e))
            else:
                for j in range(16):
                    q[j] = stochastic(clamped(v[j] * e), noise_row[16 * block + j])
            if clipping:
                scale4 = e4m3((float_of(m[block]) * mult) * f32(1.5))
                e4 = inverse(scale4, decode)
                for j in range(16):
                    q4[j] = nearest(clamped(v[j] * e4))
                squared = clipping == 2
                if block_error(v, q4, scale4, group_amax, unit, squared) < block_error(v, q, scale, group_amax, unit, squared):
                    scale = scale4
                    q[:] = q4
            if packed:
                store_codes(codes, row, block, v, q)
                scales[row, block] = e4m3_byte(scale)
            else:
                for j in range(16):
                    products[row, 16 * block + j] = q[j] * scale


@kernel
def quantize_tiles(x, first, last, groups, amax, bound, clipping, packed, products, codes, scales):  # type: ignore[no-untyped-def]
    """Bands first ... last - 1 of 16 rows, in tiles of 16 x 16; scales [bands, features / 16]. groups: of each band."""
    blocks = x.shape[1] // 16
    v, q, q4 = np.empty((16, 16), np.float32), np.empty((16, 16), np.float32), np.empty((16, 16), np.float32)
    e6, e4 = np.empty(16, np.float32), np.empty(16, np.float32)
    m, sf, enc = np.empty(blocks, np.int32), np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    sf4 = np.empty(blocks, np.float32)
    unit = f32(1.0 / (6.0 * bound))
    for band in range(first, last):
        group_amax = amax[groups[band]]
        s = global_scale(group_amax, bound)
        mult, decode = s * f32(1 / 6), f32(1) / s
        for block in range(blocks):
            m[block] = i32(0)
        for row in range(16 * band, 16 * band + 16):
            for block in range(blocks):
                top = m[block]
                for j in range(16):
                    b = both(bits_of(widen(x[row, 16 * block + j])), ABS)
                    top = b if b > top else top
                m[block] = top
        for block in range(blocks):
            sf[block] = e4m3(float_of(m[block]) * mult)
            sf4[block] = e4m3((float_of(m[block]) * mult) * f32(1.5))
        if clipping:
            for block in range(blocks):
                squared = clipping == 2
                enc6, enc4 = inverse(sf[block], decode), inverse(sf4[block], decode)
                for i in range(16):
                    for j in range(16):
                        v[i, j] = widen(x[16 * band + i, 16 * block + j])
                        q[i, j] = nearest(clamped(v[i, j] * enc6))
                        q4[i, j] = nearest(clamped(v[i, j] * enc4))
                    e6[i] = block_error(v[i], q[i], sf[block], group_amax, unit, squared)
                    e4[i] = block_error(v[i], q4[i], sf4[block], group_amax, unit, squared)
                for half in (8, 4, 2, 1):
                    for j in range(half):
                        e6[j] = e6[j] + e6[j + half]
                        e4[j] = e4[j] + e4[j + half]
                if e4[0] < e6[0]:
                    sf[block] = sf4[block]
        for block in range(blocks):
            enc[block] = inverse(sf[block], decode)
            if packed:
                scales[band, block] = e4m3_byte(sf[block])
        for row in range(16 * band, 16 * band + 16):
            if packed:
                for block in range(blocks):
                    for p in range(8):
                        low_x, high_x = widen(x[row, 16 * block + 2 * p]), widen(x[row, 16 * block + 2 * p + 1])
                        low = nibble(nearest(clamped(low_x * enc[block])), low_x < f32(0))
                        high = nibble(nearest(clamped(high_x * enc[block])), high_x < f32(0))
                        codes[row, 8 * block + p] = u8(either(low, shift_left(high, i32(4))))
            else:
                for block in range(blocks):
                    e, scale = enc[block], sf[block]
                    for j in range(16):
                        products[row, 16 * block + j] = nearest(clamped(widen(x[row, 16 * block + j]) * e)) * scale


# -- back to products ----------------------------------------------------------------------------------------------------------------------------


@kernel
def unpack_rows(codes, scales, rows_per_scale, first, last, products):  # type: ignore[no-untyped-def]
    blocks = scales.shape[1]
    for row in range(first, last):
        for block in range(blocks):
            scale = from_e4m3_byte(scales[row // rows_per_scale, block])
            for p in range(8):
                byte = i32(codes[row, 8 * block + p])
                products[row, 16 * block + 2 * p] = from_nibble(byte) * scale
                products[row, 16 * block + 2 * p + 1] = from_nibble(shift_right(byte, i32(4))) * scale


@kernel
def unpack_columns(codes, scales, first, last, products):  # type: ignore[no-untyped-def]
    """Row blocks first ... last - 1."""
    features = codes.shape[1]
    scale = np.empty(features, np.float32)
    for i in range(first, last):
        for column in range(features):
            scale[column] = from_e4m3_byte(scales[i, column])
        for p in range(8):
            for column in range(features):
                byte = i32(codes[8 * i + p, column])
                products[16 * i + 2 * p, column] = from_nibble(byte) * scale[column]
                products[16 * i + 2 * p + 1, column] = from_nibble(shift_right(byte, i32(4))) * scale[column]
