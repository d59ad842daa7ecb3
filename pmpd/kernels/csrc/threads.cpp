#include "threads.h"

#include <stdlib.h>

// The caller's OpenMP runtime, found at run time: linking one would bring a second pool of threads beside torch's.
typedef void (*ParallelFn)(void (*body)(void*), void* data, unsigned threads, unsigned flags);  // GOMP_parallel
typedef int (*CountFn)(void);
static ParallelFn gomp_parallel;
static CountFn thread_number, thread_count;

EXPORT void pmpd_set_threads(void* parallel_function, void* number, void* count) {
    gomp_parallel = (ParallelFn)parallel_function;
    thread_number = (CountFn)number;
    thread_count = (CountFn)count;
}

struct Range {
    RangeFn body;
    const void* context;
    int64_t items;
    int failed;
};

static void run_share(void* data) {
    Range* range = (Range*)data;
    const int64_t count = thread_count(), number = thread_number();
    const int64_t begin = range->items * number / count, end = range->items * (number + 1) / count;
    if (begin < end && range->body(range->context, begin, end)) __atomic_store_n(&range->failed, 1, __ATOMIC_RELAXED);
}

int parallel(int64_t items, int threads, RangeFn body, const void* context) {
    if (threads > items) threads = (int)items;
    if (items <= 0) return 0;
    if (threads <= 1 || !gomp_parallel) return body(context, 0, items);
    Range range = {body, context, items, 0};
    gomp_parallel(run_share, &range, (unsigned)threads, 0);
    return range.failed;
}

struct Together {
    void (*body)(const void*, int, int);
    const void* context;
};

static void run_together(void* data) {
    const Together* job = (const Together*)data;
    job->body(job->context, thread_number(), thread_count());
}

void together(int threads, void (*body)(const void*, int, int), const void* context) {
    if (threads <= 1 || !gomp_parallel) {
        body(context, 0, 1);
        return;
    }
    Together job = {body, context};
    gomp_parallel(run_together, &job, (unsigned)threads, 0);
}

static size_t memory_limit = SIZE_MAX;

// For tests of what happens when memory runs out: larger requests fail.
EXPORT void pmpd_limit_memory(int64_t bytes) { memory_limit = bytes < 0 ? SIZE_MAX : (size_t)bytes; }

struct Scratch {  // one per thread, freed with it
    void* data = nullptr;
    size_t bytes = 0;
    ~Scratch() { free(data); }
};
static thread_local Scratch scratch;

void* scratch_bytes(size_t wanted) {
    if (wanted > memory_limit) return nullptr;
    if (wanted > scratch.bytes) {
        free(scratch.data);
        scratch.bytes = (wanted + 4095) / 4096 * 4096;
        scratch.data = aligned_alloc(64, scratch.bytes);
        if (!scratch.data) scratch.bytes = 0;
    }
    return scratch.data;
}
