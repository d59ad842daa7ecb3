// A library around `host.h`: `instances` of the kernel in the file KERNEL_SOURCE, the memory that they may
// touch, and a launch.
#pragma once
#include "host.h"
#include KERNEL_SOURCE

struct Instance { void (*kernel)(const Arguments); int threads; };
extern const Instance instances[];
inline Arguments arguments;
inline int instance;

extern "C" int arguments_bytes() { return sizeof(Arguments); }
extern "C" void forget() { host::ranges.clear(); }
extern "C" void allow(const void* begin, int64_t bytes, int kind) {
    host::ranges.push_back({static_cast<const char*>(begin), size_t(bytes), host::Kind(kind)});
}
// Null, or what went wrong.
extern "C" const char* launch(int which, const Arguments* given, int grid, int64_t shared, int order,
                              int late, int cluster) {
    instance = which, arguments = *given;
    host::run([] { instances[instance].kernel(arguments); }, instances[which].threads, grid, size_t(shared),
              order, late != 0, cluster);
    return host::problem.empty() ? nullptr : host::problem.c_str();
}
