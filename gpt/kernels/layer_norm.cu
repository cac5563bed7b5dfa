// LayerNorm forward and backward, each with the residual add fused.
//
// Compiled at run time, once for each combination of these macros; needs no header:
//   C                   features in a row
//   VEC                 elements in an access: 1, 2, 4 or 8; C is a multiple of VEC, and every
//                       pointer is aligned to VEC elements
//   THREADS             threads for a row, a multiple of 32
//   ROWS                rows that a block takes at a time; unless THREADS is 32, 1 in forward and
//                       at most 15 in backward
//   BLOCKS              blocks that must fit into a multiprocessor's registers at the same time
//   CACHED              1: a thread keeps its part of the row in registers; 0: it reads it again
//   X_T B_T Y_T W_T     float, bf16 or fp16: the stream, the branch, the output, the weights
//   BRANCH              1 if there is a branch to add (in backward, a gradient of the stream)
//   BIAS                1 if there is a bias
//   FORWARD             1 compiles forward, 0 backward
//
// Statistics are fp32. The variance is biased. It is computed in two passes over registers and
// corrected for the rounding of the mean, so that data far from 0 lose no precision. Nothing is
// atomic: every sum has a fixed order, and two runs give the same bits.
//
// A comment `mutant NAME (FAULT at C): OLD → NEW` marks an error that the tests must notice:
// tests/test_kernels.py replaces OLD by NEW in the line above and expects FAULT at this C.

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
__device__ inline void from_float(float f, bf16& v) {  // to nearest even; a NaN stays a NaN
    const unsigned u = __float_as_uint(f);
    v.bits = f != f ? 0x7fff : (unsigned short)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// VEC elements, read and written in as few instructions as possible.
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
// In one store: left to itself, the compiler may split it into four.
__device__ inline void put(uint4* p, uint4 w) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :: "l"(p), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w) : "memory");
    // mutant words exchanged (wrong at 768): "r"(w.x), "r"(w.y) → "r"(w.y), "r"(w.x)
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
__device__ inline void unpack(const Pack<bf16>& pack, float (&v)[VEC]) {  // word by word
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
// Two 16-bit numbers in one 32-bit word.
__device__ inline unsigned both(float low, float high, bf16) {
#if __CUDA_ARCH__ >= 800
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    // mutant halves of a word exchanged (wrong at 768): "f"(high), "f"(low) → "f"(low), "f"(high)
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

// Wait for the threads of this row only: the block's other rows go on.
__device__ inline void row_barrier() {
    if (ROWS == 1) {
        __syncthreads();
    } else {
        asm volatile("barrier.sync %0, %1;"
                     :: "r"(threadIdx.x / THREADS + 1), "n"(THREADS) : "memory");
        // mutant a barrier for the wrong row (a deadlock at 768): THREADS + 1 → THREADS / 2 + 1
        // mutant a barrier that does not exist (no such barrier at 768): THREADS + 1 → THREADS + 13
    }
}

// The sums of a and b over the threads of a row; each of these threads gets both sums.
constexpr int WARPS = THREADS / 32;
__device__ inline void row_sum(float& a, float& b, float2* shared) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        // mutant a lane left out (wrong at 768): step > 0 → step > 1
        a += __shfl_xor_sync(0xffffffffu, a, step);
        b += __shfl_xor_sync(0xffffffffu, b, step);
    }
    if (WARPS == 1) return;
    if (threadIdx.x % 32 == 0) shared[threadIdx.x % THREADS / 32] = make_float2(a, b);
    row_barrier();
    // mutant no barrier in a row's sum (a race at 768): row_barrier(); → ;
    a = b = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        // mutant a warp left out (wrong at 768): w < WARPS → w < WARPS - 1
        a += shared[w].x;
        b += shared[w].y;
    }
}

constexpr int STEPS = (C + THREADS * VEC - 1) / (THREADS * VEC);  // accesses per thread and row
constexpr int HELD = CACHED ? STEPS : 1;
constexpr int UNROLL = CACHED ? STEPS : 4;
constexpr bool EVEN = C % (THREADS * VEC) == 0;  // else the last access may pass the end
// A thread's accesses to a row: c is the first element, h is where the elements are held.
#define EACH_ACCESS                                                          \
    _Pragma("unroll UNROLL") for (int s = 0; s < STEPS; s++)                 \
        if (const int c = (s * THREADS + lane) * VEC, h = CACHED ? s : 0;    \
            EVEN || s < STEPS - 1 || c < C)

#if FORWARD

// stream = x + branch, rounded to X_T; y = weight (stream − mean) rstd + bias.
// THREADS threads take one row. x, branch, y and stream are (n_rows, C), mean and rstd (n_rows).
extern "C" __global__ void __launch_bounds__(THREADS * ROWS, BLOCKS) layer_norm_forward(
    const X_T* x, const B_T* branch, const W_T* weight, const W_T* bias, Y_T* y, X_T* stream,
    float* mean, float* rstd, i64 n_rows, float eps) {
    __shared__ float2 shared[2][WARPS];
    const int lane = threadIdx.x % THREADS;
    const i64 row = (i64)blockIdx.x * ROWS + threadIdx.x / THREADS;
    if (row >= n_rows) return;
    // mutant a row past the end (out of bounds at 512): >= → >
    // mutant half a warp (a shuffle without the whole warp at 32): n_rows → n_rows || lane > 5
    x += row * C;
    // mutant a row read askew (misaligned at 768): row * C → row * C + 2
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
    if (CACHED) {  // request the whole row before using any of it
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
            unpack(total, v[h]);  // normalise what backward will read
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
    // mutant one buffer for both sums (a race at 8200): shared[1] → shared[0]
    const float shift = rest * (1.0f / C);  // what the mean lost to rounding
    float variance = square * (1.0f / C) - shift * shift;
    // mutant unbiased variance (wrong at 768): square * (1.0f / C) → square * (1.0f / (C - 1))
    if (variance < 0.0f) variance = 0.0f;  // a NaN stays a NaN
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
        // mutant a mean of two lanes (threads wrote to one place at 768): lane == 0 → lane < 2
        mean[row] = rough + shift;
        rstd[row] = scale;
    }
}

#else

template <typename A, typename B> constexpr bool SAME = false;
template <typename T> constexpr bool SAME<T, T> = true;

// dx = rstd (g − mean(g) − x̂ mean(g x̂)) + dstream, where g = dy weight and x̂ = (x − mean) rstd;
// dbranch is the same, rounded to B_T; it is written only if B_T and X_T differ.

#if CACHED

// Persistent: a block has ROWS groups of THREADS threads. Each group takes one row after another
// and does not wait for the others. Block b writes the sums of dy x̂ and dy over its rows to
// partial[b][0] and partial[b][1]; partial is (gridDim.x, 2, C) in fp32.
extern "C" __global__ void __launch_bounds__(THREADS * ROWS, BLOCKS) layer_norm_backward(
    const Y_T* dy, const X_T* dstream, const X_T* x, const W_T* weight, const float* mean,
    const float* rstd, X_T* dx, B_T* dbranch, float* partial, i64 n_rows) {
    __shared__ float2 shared[2][ROWS][WARPS];
    const int lane = threadIdx.x % THREADS, group = threadIdx.x / THREADS;
    const int stride = gridDim.x * ROWS;
    float dgamma[HELD][VEC] = {}, dbeta[HELD][VEC] = {};
    int turn = 0;  // with two buffers, one barrier per row is enough
    for (i64 row = (i64)blockIdx.x * ROWS + group; row < n_rows; row += stride, turn ^= 1) {
        // mutant rows left out (wrong at 768): row += stride → row += 2 * stride
        // mutant one buffer for every row (a race at 768): turn ^= 1 → turn
        const float mu = mean[row], scale = rstd[row];
        float x_hat[HELD][VEC], g[HELD][VEC];
        Pack<X_T> more[HELD];
        float sum_g = 0.0f, sum_gx = 0.0f;
        EACH_ACCESS {
            load(x + row * C + c, x_hat[h]);
            load(dy + row * C + c, g[h]);
            if (BRANCH) more[h] = read(dstream + row * C + c);  // early: it arrives with the others
        }
        EACH_ACCESS {
            float w[VEC];
            load(weight + c, w);  // from the cache: there are no registers left to keep it
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
    // mutant threads that leave early (a deadlock at 768): partial → if (lane == 9) return; partial
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
            // mutant no barrier between groups (a race at 768): __syncthreads(); → ;
            // mutant a group's barrier between groups (a race at 768): __syncthreads → row_barrier
            for (int c = threadIdx.x; c < C; c += THREADS * ROWS) {
                float sum = 0.0f;
#pragma unroll
                for (int r = 0; r < ROWS; r++) sum += sums[r][c];  // always in the same order
                partial[c] = sum;
            }
            __syncthreads();
            // mutant one buffer for both sums of groups (a race at 768): __syncthreads(); → ;
            // mutant a group's barrier for both sums (a race at 768): __syncthreads → row_barrier
        }
    }
}

#else

// Rows too long for registers are read twice. A block takes one row at a time.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) layer_norm_backward(
    const Y_T* dy, const X_T* dstream, const X_T* x, const W_T* weight, const float* mean,
    const float* rstd, X_T* dx, B_T* dbranch, float*, i64 n_rows) {
    __shared__ float2 shared[2][WARPS];
    const int lane = threadIdx.x;
    int turn = 0;
    for (i64 row = blockIdx.x; row < n_rows; row += gridDim.x, turn ^= 1) {
        // mutant one buffer for every long row (a race at 8200): turn ^= 1 → turn
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

// The partial sums of these rows: partial[b] is the sum over rows b·chunk to (b + 1)·chunk. Each
// thread takes one column.
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

// dweight and dbias: the sums of n_partial partial sums, always in the same order. A block takes 32
// columns, with 32 threads for each column.
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
    // mutant no barrier in the last sum (a race at 768): __syncthreads(); → ;
    sum = shared[lane][warp];  // now each warp has one column
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
