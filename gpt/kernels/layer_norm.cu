// LayerNorm forward and backward, each with the residual add fused.
//
// Compiled at run time, once for each combination of these macros; needs no header:
//   C                   features a row
//   VEC                 elements an access: 1, 2, 4 or 8; divides C, and every pointer is aligned to it
//   THREADS             threads a row, a multiple of 32
//   ROWS                rows a block at a time; in forward 1 unless THREADS is 32, in
//                       backward 15 at most unless THREADS is 32
//   BLOCKS              blocks that a multiprocessor must have registers for at once
//   CACHED              1: a thread holds its part of the row in registers; 0: it reads it again
//   X_T B_T Y_T W_T     float, bf16 or fp16: the stream, the branch, the output, the weights
//   BRANCH BIAS         1 where there is a branch to add (in backward, a gradient of the stream), a bias
//   FORWARD             1 or 0: which of the two directions is compiled
//
// Statistics are fp32. The variance is biased and taken in two passes over registers, corrected for
// the rounding of the mean, so that data far from 0 lose nothing. Nothing is atomic: every sum has
// a fixed order, and two runs agree to the bit.

typedef long long i64;
struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(bf16 v) { return __uint_as_float((unsigned)v.bits << 16); }
__device__ inline float to_float(fp16 v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
    return f;
}
__device__ inline void from_float(float f, float& v) { v = f; }
__device__ inline void from_float(float f, fp16& v) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v.bits) : "f"(f));
}
__device__ inline void from_float(float f, bf16& v) {  // to nearest even; a NaN stays one
    const unsigned u = __float_as_uint(f);
    v.bits = f != f ? 0x7fff : (unsigned short)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// VEC elements, read and written in as few instructions as they fit into.
template <int BYTES> struct Words { uint4 word[BYTES / 16]; };
template <> struct Words<8> { uint2 word[1]; };
template <> struct Words<4> { unsigned word[1]; };
template <> struct Words<2> { unsigned short word[1]; };
template <typename T>
union Pack {
    Words<sizeof(T) * VEC> words;
    T v[VEC];
};
template <typename T>
__device__ inline Pack<T> read(const T* p) {
    Pack<T> pack;
    pack.words = *reinterpret_cast<const Words<sizeof(T) * VEC>*>(p);
    return pack;
}
template <typename W>
__device__ inline void put(W* p, W w) { *p = w; }
// In one store: the compiler, left to itself, may make four of it.
__device__ inline void put(uint4* p, uint4 w) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :: "l"(p), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w) : "memory");
}
__device__ inline void put(uint2* p, uint2 w) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" :: "l"(p), "r"(w.x), "r"(w.y) : "memory");
}
template <typename T>
__device__ inline void write(T* p, const Pack<T>& pack) {
    auto* to = reinterpret_cast<Words<sizeof(T) * VEC>*>(p);
#pragma unroll
    for (int i = 0; i < sizeof(pack.words) / sizeof(pack.words.word[0]); i++) {
        put(&to->word[i], pack.words.word[i]);
    }
}

template <typename T>
__device__ inline void unpack(const Pack<T>& pack, float (&v)[VEC]) {
#pragma unroll
    for (int i = 0; i < VEC; i++) v[i] = to_float(pack.v[i]);
}
template <>
__device__ inline void unpack(const Pack<bf16>& pack, float (&v)[VEC]) {  // by words: half the work
    if constexpr (VEC == 1) {
        v[0] = to_float(pack.v[0]);
    } else {
        alignas(16) unsigned words[(VEC + 1) / 2];
        *reinterpret_cast<Words<2 * VEC>*>(words) = pack.words;
#pragma unroll
        for (int i = 0; i < VEC; i += 2) {
            v[i] = __uint_as_float(words[i / 2] << 16);
            v[i + 1] = __uint_as_float(words[i / 2] & 0xffff0000u);
        }
    }
}
// Two of them in the halves of a word.
__device__ inline unsigned both(float low, float high, bf16) {
#if __CUDA_ARCH__ >= 800
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    bf16 l, h;
    from_float(low, l);
    from_float(high, h);
    return l.bits | (unsigned)h.bits << 16;
#endif
}
__device__ inline unsigned both(float low, float high, fp16) {
    fp16 l, h;
    from_float(low, l);
    from_float(high, h);
    return l.bits | (unsigned)h.bits << 16;
}
template <typename T>
__device__ inline Pack<T> rounded(const float (&v)[VEC]) {
    Pack<T> pack;
    if constexpr (sizeof(T) == 2 && VEC >= 2) {
        alignas(16) unsigned words[(VEC + 1) / 2];
#pragma unroll
        for (int i = 0; i < VEC; i += 2) words[i / 2] = both(v[i], v[i + 1], T());
        pack.words = *reinterpret_cast<Words<sizeof(T) * VEC>*>(words);
    } else {
#pragma unroll
        for (int i = 0; i < VEC; i++) from_float(v[i], pack.v[i]);
    }
    return pack;
}

template <typename T>
__device__ inline void load(const T* p, float (&v)[VEC]) {
    unpack(read(p), v);
}
template <typename T>
__device__ inline void store(T* p, const float (&v)[VEC]) {
    write(p, rounded<T>(v));
}

// The sums of a and b over the threads of a row, the same in each of them.
constexpr int WARPS = THREADS / 32;
__device__ inline void row_sum(float& a, float& b, float2* shared) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        a += __shfl_xor_sync(0xffffffffu, a, step);
        b += __shfl_xor_sync(0xffffffffu, b, step);
    }
    if (WARPS == 1) return;
    if (threadIdx.x % 32 == 0) shared[threadIdx.x % THREADS / 32] = make_float2(a, b);
    if (ROWS == 1) {
        __syncthreads();
    } else {  // the threads of this row alone: the block's other rows need not wait for it
        asm volatile("barrier.sync %0, %1;"
                     :: "r"(threadIdx.x / THREADS + 1), "n"(THREADS) : "memory");
    }
    a = b = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        a += shared[w].x;
        b += shared[w].y;
    }
}

constexpr int STEPS = (C + THREADS * VEC - 1) / (THREADS * VEC);  // accesses of a thread to a row
constexpr int HELD = CACHED ? STEPS : 1;
constexpr int UNROLL = CACHED ? STEPS : 4;
constexpr bool EVEN = C % (THREADS * VEC) == 0;  // else the last access may reach past the row
// The first element of each access, and where it is held.
#define EACH_ACCESS                                                          \
    _Pragma("unroll UNROLL") for (int s = 0; s < STEPS; s++)                 \
        if (const int c = (s * THREADS + lane) * VEC, h = CACHED ? s : 0;    \
            EVEN || s < STEPS - 1 || c < C)

#if FORWARD

// stream = x + branch, rounded to X_T; y = weight (stream − mean) rstd + bias.
// One row for each THREADS threads; x, branch, y, stream (n_rows, C), mean and rstd (n_rows).
extern "C" __global__ void __launch_bounds__(THREADS * ROWS, BLOCKS) layer_norm_forward(
    const X_T* x, const B_T* branch, const W_T* weight, const W_T* bias, Y_T* y, X_T* stream,
    float* mean, float* rstd, i64 n_rows, float eps) {
    __shared__ float2 shared[2][WARPS];
    const int lane = threadIdx.x % THREADS;
    const i64 row = (i64)blockIdx.x * ROWS + threadIdx.x / THREADS;
    if (row >= n_rows) return;
    x += row * C;
    y += row * C;
    if (BRANCH) {
        branch += row * C;
        stream += row * C;
    }
    Pack<X_T> from_x[HELD];
    Pack<B_T> from_branch[HELD];
    const auto request = [&](int c, int h) {
        from_x[h] = read(x + c);
        if (BRANCH) from_branch[h] = read(branch + c);
    };
    if (CACHED) {  // all of the row is on its way before the first of it is used
        EACH_ACCESS request(c, h);
    }
    float v[HELD][VEC];
    float sum = 0.0f, unused = 0.0f;
    EACH_ACCESS {
        if (!CACHED) request(c, h);
        unpack(from_x[h], v[h]);
        if (BRANCH) {
            float b[VEC];
            unpack(from_branch[h], b);
#pragma unroll
            for (int i = 0; i < VEC; i++) b[i] += v[h][i];
            const Pack<X_T> total = rounded<X_T>(b);
            write(stream + c, total);
            unpack(total, v[h]);  // what backward will read is what is normalised here
        }
#pragma unroll
        for (int i = 0; i < VEC; i++) sum += v[h][i];
    }
    row_sum(sum, unused, shared[0]);
    const X_T* again = BRANCH ? stream : x;
    const float rough = sum * (1.0f / C);
    float square = 0.0f, rest = 0.0f;
    EACH_ACCESS {
        if (!CACHED) load(again + c, v[h]);
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            v[h][i] -= rough;
            rest += v[h][i];
            square += v[h][i] * v[h][i];
        }
    }
    row_sum(square, rest, shared[1]);
    const float shift = rest * (1.0f / C);  // what the mean lost to rounding
    float variance = square * (1.0f / C) - shift * shift;
    if (variance < 0.0f) variance = 0.0f;  // and a NaN stays one
    const float scale = rsqrtf(variance + eps), offset = -shift * scale;
    EACH_ACCESS {
        if (!CACHED) {
            load(again + c, v[h]);
#pragma unroll
            for (int i = 0; i < VEC; i++) v[h][i] -= rough;
        }
        float w[VEC], b[VEC];
        load(weight + c, w);
        if (BIAS) load(bias + c, b);
        float out[VEC];
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            out[i] = (v[h][i] * scale + offset) * w[i] + (BIAS ? b[i] : 0.0f);
        }
        store(y + c, out);
    }
    if (lane == 0) {
        mean[row] = rough + shift;
        rstd[row] = scale;
    }
}

#else

template <typename A, typename B> constexpr bool SAME = false;
template <typename T> constexpr bool SAME<T, T> = true;

// dx = rstd (g − mean(g) − x̂ mean(g x̂)) + dstream, where g = dy weight and x̂ = (x − mean) rstd;
// dbranch is the same, rounded to B_T, where that is another type.

#if CACHED

// Persistent: the block's ROWS groups of THREADS threads take a row each, and go on to further ones
// without waiting for each other. Block b leaves the sums of its rows' dy x̂ and dy in partial[b][0]
// and partial[b][1], (gridDim.x, 2, C) in fp32.
extern "C" __global__ void __launch_bounds__(THREADS * ROWS, BLOCKS) layer_norm_backward(
    const Y_T* dy, const X_T* dstream, const X_T* x, const W_T* weight, const float* mean,
    const float* rstd, X_T* dx, B_T* dbranch, float* partial, i64 n_rows) {
    __shared__ float2 shared[2][ROWS][WARPS];
    const int lane = threadIdx.x % THREADS, group = threadIdx.x / THREADS;
    const int stride = gridDim.x * ROWS;
    float dgamma[HELD][VEC] = {}, dbeta[HELD][VEC] = {};
    int turn = 0;  // two buffers, so that one barrier a row is enough
    for (i64 row = (i64)blockIdx.x * ROWS + group; row < n_rows; row += stride, turn ^= 1) {
        const float mu = mean[row], scale = rstd[row];
        float x_hat[HELD][VEC], g[HELD][VEC];
        Pack<X_T> more[HELD];
        float sum_g = 0.0f, sum_gx = 0.0f;
        EACH_ACCESS {
            load(x + row * C + c, x_hat[h]);
            load(dy + row * C + c, g[h]);
            if (BRANCH) more[h] = read(dstream + row * C + c);  // else its wait came after
        }
        EACH_ACCESS {
            float w[VEC];
            load(weight + c, w);  // out of the cache: there is no register left to keep it
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                x_hat[h][i] = (x_hat[h][i] - mu) * scale;
                dgamma[h][i] += g[h][i] * x_hat[h][i];
                dbeta[h][i] += g[h][i];
                g[h][i] *= w[i];
                sum_g += g[h][i];
                sum_gx += g[h][i] * x_hat[h][i];
            }
        }
        row_sum(sum_g, sum_gx, shared[turn][group]);
        const float mean_g = sum_g * (1.0f / C), mean_gx = sum_gx * (1.0f / C);
        EACH_ACCESS {
            float out[VEC], add[VEC];
            if (BRANCH) unpack(more[h], add);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                out[i] = (g[h][i] - (x_hat[h][i] * mean_gx + mean_g)) * scale;
                if (BRANCH) out[i] += add[i];
            }
            store(dx + row * C + c, out);
            if (!SAME<X_T, B_T>) store(dbranch + row * C + c, out);
        }
    }
    partial += (i64)blockIdx.x * 2 * C;
    if constexpr (ROWS == 1) {
        EACH_ACCESS {
            store(partial + c, dgamma[h]);
            store(partial + C + c, dbeta[h]);
        }
    } else {
        __shared__ float sums[ROWS][C];
#pragma unroll
        for (int which = 0; which < 2; which++, partial += C) {
            EACH_ACCESS {
#pragma unroll
                for (int i = 0; i < VEC; i++) sums[group][c + i] = (which ? dbeta : dgamma)[h][i];
            }
            __syncthreads();
            for (int c = threadIdx.x; c < C; c += THREADS * ROWS) {
                float sum = 0.0f;
#pragma unroll
                for (int r = 0; r < ROWS; r++) sum += sums[r][c];  // always in the same order
                partial[c] = sum;
            }
            __syncthreads();
        }
    }
}

#else

// Rows too long for registers are read twice, a row a block at a time.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) layer_norm_backward(
    const Y_T* dy, const X_T* dstream, const X_T* x, const W_T* weight, const float* mean,
    const float* rstd, X_T* dx, B_T* dbranch, float*, i64 n_rows) {
    __shared__ float2 shared[2][WARPS];
    const int lane = threadIdx.x;
    int turn = 0;
    for (i64 row = blockIdx.x; row < n_rows; row += gridDim.x, turn ^= 1) {
        const float mu = mean[row], scale = rstd[row];
        float x_hat[VEC], g[VEC], w[VEC];
        const auto get = [&](int c) {
            load(x + row * C + c, x_hat);
            load(dy + row * C + c, g);
            load(weight + c, w);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                x_hat[i] = (x_hat[i] - mu) * scale;
                g[i] *= w[i];
            }
        };
        float sum_g = 0.0f, sum_gx = 0.0f;
        EACH_ACCESS {
            get(c);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                sum_g += g[i];
                sum_gx += g[i] * x_hat[i];
            }
        }
        row_sum(sum_g, sum_gx, shared[turn]);
        const float mean_g = sum_g * (1.0f / C), mean_gx = sum_gx * (1.0f / C);
        EACH_ACCESS {
            get(c);
            float out[VEC], more[VEC];
            if (BRANCH) load(dstream + row * C + c, more);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                out[i] = (g[i] - mean_g - x_hat[i] * mean_gx) * scale;
                if (BRANCH) out[i] += more[i];
            }
            store(dx + row * C + c, out);
            if (!SAME<X_T, B_T>) store(dbranch + row * C + c, out);
        }
    }
}

// And their partial sums: partial[b] from rows b·chunk to (b + 1)·chunk, a thread a column.
extern "C" __global__ void __launch_bounds__(256) layer_norm_columns(
    const Y_T* dy, const X_T* x, const float* mean, const float* rstd, float* partial, i64 n_rows) {
    const i64 c = (i64)blockIdx.x * 256 + threadIdx.x;
    if (c >= C) return;
    const i64 chunk = (n_rows + gridDim.y - 1) / gridDim.y;
    const i64 first = blockIdx.y * chunk, past = first + chunk < n_rows ? first + chunk : n_rows;
    float dgamma = 0.0f, dbeta = 0.0f;
    for (i64 row = first; row < past; row++) {
        const float g = to_float(dy[row * C + c]);
        dgamma += g * (to_float(x[row * C + c]) - mean[row]) * rstd[row];
        dbeta += g;
    }
    partial[(i64)blockIdx.y * 2 * C + c] = dgamma;
    partial[(i64)blockIdx.y * 2 * C + C + c] = dbeta;
}

#endif

// dweight and dbias from n_partial rows of partial sums, always in the same order: 32 columns a
// block, 32 threads a column.
extern "C" __global__ void __launch_bounds__(1024) layer_norm_finalise(
    const float* partial, W_T* dweight, W_T* dbias, i64 n_partial) {
    __shared__ float shared[32][33];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum = 0.0f;
    if (const int column = blockIdx.x * 32 + lane; column < 2 * C) {
#pragma unroll 8
        for (i64 p = warp; p < n_partial; p += 32) sum += partial[p * 2 * C + column];
    }
    shared[warp][lane] = sum;
    __syncthreads();
    sum = shared[lane][warp];  // now a warp has a column's
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (const int column = blockIdx.x * 32 + warp; lane == 0 && column < 2 * C) {
        if (column < C) {
            from_float(sum, dweight[column]);
        } else if (BIAS) {
            from_float(sum, dbias[column - C]);
        }
    }
}

#endif
