// The caller's threads, and memory that each of them keeps.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

// Items begin..end of a job; `context` is the job. 0, or 1 where memory ran out.
typedef int (*RangeFn)(const void* context, int64_t begin, int64_t end);

// Runs `body` over items 0..items on up to `threads` threads, each one range. 0, or 1 where any of them ran out of memory.
int parallel(int64_t items, int threads, RangeFn body, const void* context);

// Runs `body` once on each of up to `threads` threads at the same time, with its number and how many there are.
void together(int threads, void (*body)(const void* context, int thread, int count), const void* context);

// At least so many bytes, aligned to a cache line, the thread's own until it asks again; null where there are none.
void* scratch_bytes(size_t wanted);
