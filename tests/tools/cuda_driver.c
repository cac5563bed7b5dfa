// Stands for the CUDA driver, as libcuda.so.1: prints what it is asked to do.
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static int get(int *device, int ordinal) {
    return dprintf(1, "device %d\n", *device = ordinal) < 0;
}
static int retain(void **context, int device) {
    *context = (void *)0x100;
    return dprintf(1, "context of device %d\n", device) < 0;
}
static int set_current(void *context) { return dprintf(1, "current %p\n", context) < 0; }
static int load(void **module, const char *image) {
    *module = (void *)0x200;
    return dprintf(1, "module %.3s\n", image + 1) < 0;
}
static int get_function(void **function, void *module, const char *name) {
    *function = (void *)0x300;
    return dprintf(1, "function %s of %p\n", name, module) < 0;
}
static int launch(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned by,
                  unsigned bz, unsigned shared, void *stream, void **values, void **extra) {
    if (x == 0) return 1;  // CUDA_ERROR_INVALID_VALUE
    dprintf(1, "%p in %u %u %u blocks of %u %u %u threads, %u bytes, on %p, %s\n", function, x, y,
            z, threads, by, bz, shared, stream, extra ? "with extra" : "no extra");
    return dprintf(1, "%p %p %lld %g\n", *(void **)values[0], *(void **)values[1],
                   *(long long *)values[2], *(float *)values[3]) < 0;
}

// How cuda.bindings asks for each function. An unknown one is CUDA_ERROR_NOT_FOUND.
int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags,
                        int *status) {
    static const struct { const char *name; void *function; } all[] = {
        {"cuDeviceGet", get},
        {"cuDevicePrimaryCtxRetain", retain},
        {"cuCtxSetCurrent", set_current},
        {"cuModuleLoadData", load},
        {"cuModuleGetFunction", get_function},
        {"cuLaunchKernel", launch},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (strcmp(name, all[i].name) == 0) return *function = all[i].function, 0;
    return 500;
}
