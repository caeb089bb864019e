// What CUDA C++ needs of a host compiler. Threads of a block take turns: each runs to its next barrier before any runs
// on, forwards or backwards, so that what depends on their order shows; a block whose threads do not all arrive is told.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__ static inline
#define __shared__ static

struct Dim { unsigned x, y, z; };
static Dim threadIdx, blockIdx, gridDim;
static ucontext_t host, fibers[1024];
static bool over[1024];
static std::vector<char> stacks;
static void (*body)();

static void enter()
{
    body();
    over[threadIdx.x] = true;
    swapcontext(&fibers[threadIdx.x], &host);
}

static void __syncthreads() { swapcontext(&fibers[threadIdx.x], &host); }

static int run_block(unsigned threads, int backwards)
{
    const size_t room = 1 << 16;
    stacks.resize(threads * room);
    for (unsigned i = 0; i < threads; i++) {
        getcontext(&fibers[i]);
        fibers[i].uc_stack.ss_sp = stacks.data() + i * room;
        fibers[i].uc_stack.ss_size = room;
        makecontext(&fibers[i], enter, 0);
        over[i] = false;
    }
    for (;;) {
        unsigned ended = 0;
        for (unsigned turn = 0; turn < threads; turn++) {
            threadIdx.x = backwards ? threads - 1 - turn : turn;
            swapcontext(&host, &fibers[threadIdx.x]);
        }
        for (unsigned i = 0; i < threads; i++) ended += over[i];
        if (ended == threads) return 0;
        if (ended) return 1;
    }
}

static int run_grid(unsigned x, unsigned y, unsigned z, unsigned threads, int backwards)
{
    gridDim = {x, y, z};
    for (unsigned i = 0; i < x * y * z; i++) {
        unsigned block = backwards ? x * y * z - 1 - i : i;
        blockIdx = {block % x, block / x % y, block / (x * y)};
        if (run_block(threads, backwards)) return 1;
    }
    return 0;
}
