// Runs layer_norm.cu on the host, thread by thread: each CUDA thread is a fiber, a shuffle waits
// for its warp and a barrier for its block, as on the device. Slow and exact.
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define CUDA_ON_HOST
#define __device__
#define __global__
#define __shared__ static  // blocks run one after the other
#define __launch_bounds__(...)

extern "C" { bool only_last_block = false; }
struct Index { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
static Index threadIdx, blockIdx, gridDim;

namespace fibers {
enum State { READY, AT_SHUFFLE, AT_BARRIER, DONE };
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state = READY;
    int shuffles = 0;
    float slot[2];  // what this lane offers to the even and the odd shuffle
};
static std::vector<Fiber> all;
static ucontext_t scheduler;
static unsigned current;
static const std::function<void()>* body;

static void entry() {
    (*body)();
    all[current].state = DONE;
}
static void wait(State state) {
    const unsigned self = current;
    all[self].state = state;
    swapcontext(&all[self].context, &scheduler);
}
// Release the fibers [first, past) if all of them that still run wait for the same thing.
static bool release(unsigned first, unsigned past, State state) {
    bool any = false;
    for (unsigned i = first; i < past; i++) {
        if (all[i].state == DONE) continue;
        if (all[i].state != state) return false;
        any = true;
    }
    for (unsigned i = first; any && i < past; i++)
        if (all[i].state == state) all[i].state = READY;
    return any;
}
static void run_block(unsigned threads) {
    all = std::vector<Fiber>(threads);
    for (unsigned i = 0; i < threads; i++) {
        Fiber& f = all[i];
        const size_t size = 64 << 10;
        f.stack.reset(new char[size]);
        getcontext(&f.context);
        f.context.uc_stack = {f.stack.get(), 0, size};
        f.context.uc_link = &scheduler;
        makecontext(&f.context, entry, 0);
    }
    // Each warp in turn runs as far ahead of the others as barriers let it, in every second block
    // the last one first: what a missing barrier leaves to chance comes out wrong.
    do {
        for (unsigned turn = 0; turn < threads; turn += 32) {
            const unsigned first = blockIdx.x % 2 ? threads - 32 - turn : turn;
            do {
                for (unsigned i = first; i < first + 32; i++) {
                    if (all[i].state != READY) continue;
                    current = i;
                    threadIdx = {i, 0, 0};
                    swapcontext(&scheduler, &all[i].context);
                }
            } while (release(first, first + 32, AT_SHUFFLE));
        }
    } while (release(0, threads, AT_BARRIER));
    for (const Fiber& fiber : all) {
        if (fiber.state == DONE) continue;
        std::fprintf(stderr, "deadlock: threads of a block wait for different things\n");
        std::abort();
    }
}
}  // namespace fibers

static void launch(Index grid, unsigned threads, const std::function<void()>& body) {
    fibers::body = &body;
    gridDim = grid;
    for (blockIdx.y = only_last_block ? grid.y - 1 : 0; blockIdx.y < grid.y; blockIdx.y++)
        for (blockIdx.x = only_last_block ? grid.x - 1 : 0; blockIdx.x < grid.x; blockIdx.x++)
            fibers::run_block(threads);
}

static void __syncthreads() { fibers::wait(fibers::AT_BARRIER); }
static float __shfl_xor_sync(unsigned, float value, int step) {
    const unsigned self = fibers::current;
    const int turn = fibers::all[self].shuffles++ % 2;
    fibers::all[self].slot[turn] = value;
    fibers::wait(fibers::AT_SHUFFLE);
    return fibers::all[self ^ step].slot[turn];
}
static float __uint_as_float(unsigned u) { float f; std::memcpy(&f, &u, 4); return f; }
static float rsqrtf(float f) { return 1.0f / std::sqrt(f); }
static unsigned __float_as_uint(float f) { unsigned u; std::memcpy(&u, &f, 4); return u; }

static float half_to_float(unsigned short h) {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    float f = exponent == 0    ? std::ldexp((float)fraction, -24)
              : exponent == 31 ? (fraction ? NAN : INFINITY)
                               : std::ldexp((float)(1024 + fraction), exponent - 25);
    return h & 0x8000 ? -f : f;
}
static unsigned short float_to_half(float f) {  // to nearest even
    const unsigned short sign = std::signbit(f) ? 0x8000 : 0;
    const float a = std::fabs(f);
    if (a != a) return sign | 0x7e00;
    if (a >= 65520.0f) return sign | 0x7c00;
    int exponent;
    std::frexp(a, &exponent);
    exponent = a == 0 ? -13 : exponent < -13 ? -13 : exponent;  // subnormals share one exponent
    const long units = std::lrint(std::ldexp((double)a, 11 - exponent));
    return sign | (unsigned short)(((exponent + 13) << 10) + units);
}

#include "layer_norm.cu"

extern "C" {
#if FORWARD
void forward(unsigned grid_x, unsigned grid_y, unsigned threads, const X_T* x, const B_T* branch,
             const W_T* weight, const W_T* bias, Y_T* y, X_T* stream, float* mean, float* rstd,
             i64 n_rows, float eps) {
    launch({grid_x, grid_y, 1}, threads, [=] {
        layer_norm_forward(x, branch, weight, bias, y, stream, mean, rstd, n_rows, eps);
    });
}
#else
void backward(unsigned grid_x, unsigned grid_y, unsigned threads, const Y_T* dy, const X_T* dstream,
              const X_T* x, const W_T* weight, const float* mean, const float* rstd, X_T* dx,
              B_T* dbranch, float* partial, i64 n_rows) {
    launch({grid_x, grid_y, 1}, threads, [=] {
        layer_norm_backward(dy, dstream, x, weight, mean, rstd, dx, dbranch, partial, n_rows);
    });
}
#if !CACHED
void columns(unsigned grid_x, unsigned grid_y, unsigned threads, const Y_T* dy, const X_T* x,
             const float* mean, const float* rstd, float* partial, i64 n_rows) {
    launch({grid_x, grid_y, 1}, threads,
           [=] { layer_norm_columns(dy, x, mean, rstd, partial, n_rows); });
}
#endif
void finalise(unsigned grid_x, unsigned grid_y, unsigned threads, const float* partial, W_T* dweight,
              W_T* dbias, i64 n_partial) {
    launch({grid_x, grid_y, 1}, threads,
           [=] { layer_norm_finalise(partial, dweight, dbias, n_partial); });
}
#endif
}
