/* Masks chosen and applied in as few passes over memory as there can be; see library.py.

A plain shared library: no header but C's own, no symbol of Python or torch. The loops stand in
loops.h and packed.h, which are compiled once for each instruction set; Python calls those that level() allows.
Every sum and product is rounded as torch rounds it, so no compiler may contract them to fused ones
(-ffp-contract=off). */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#include <pthread.h>
#endif

#if defined(__GNUC__)
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif

enum kind { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, PACKED = 3 };

#define BLOCK 1024       /* numbers looked at together: their temporaries stay in the first cache */
#define PART (1 << 18)   /* fewer numbers than this are not worth a thread */
#define MOST_THREADS 64

/* Which scores are kept. By size: magnitudes above `cut`, and those that equal it from `place` on;
magnitudes are their bits without the sign, which order like them. Else: scores above `above`. Or no
scores but the mask itself, PACKED: one bit a weight, the lowest of a byte first. */
typedef struct {
    const void *scores;
    int64_t kind, by_size, cut, place;
    float above;
} choice;

/* A weight, or the period of one that repeats. */
typedef struct {
    const void *data;
    int64_t kind, period;
} numbers;

/* ---- threads: the range 0 to n in parts ------------------------------------------------------ */

typedef void (*work)(void *job, int64_t start, int64_t stop, int64_t part);

typedef struct {
    work run;
    void *job;
    int64_t start, stop, part;
} errand;

static int64_t parts_of(int64_t n, int64_t threads) {
    int64_t most = n / PART < MOST_THREADS ? n / PART : MOST_THREADS;
    int64_t parts = threads < most ? threads : most;
    return parts < 1 ? 1 : parts;
}

#if defined(_WIN32)
static void in_parts(work run, void *job, int64_t n, int64_t parts) {
    for (int64_t part = 0; part < parts; part++)
        run(job, n * part / parts, n * (part + 1) / parts, part);
}
#else
static void *run_errand(void *given) {
    errand *mine = given;
    mine->run(mine->job, mine->start, mine->stop, mine->part);
    return NULL;
}

static void in_parts(work run, void *job, int64_t n, int64_t parts) {
    errand errands[MOST_THREADS];
    pthread_t threads[MOST_THREADS];
    int started[MOST_THREADS];
    for (int64_t part = 1; part < parts; part++) {
        errands[part] = (errand){run, job, n * part / parts, n * (part + 1) / parts, part};
        started[part] = !pthread_create(&threads[part], NULL, run_errand, &errands[part]);
    }
    run(job, 0, n / parts, 0);
    for (int64_t part = 1; part < parts; part++) {
        if (started[part])
            pthread_join(threads[part], NULL);
        else
            run_errand(&errands[part]);
    }
}
#endif

/* ---- the loops, for each instruction set ----------------------------------------------------- */

#define TARGET
#define NAME(function) function##_base
#include "loops.h"
#include "packed.h"
#undef TARGET
#undef NAME

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
#define EIGHT_AT_ONCE

#define TARGET __attribute__((target("avx2,fma,bmi,bmi2,popcnt")))
#define NAME(function) function##_avx2
#include "loops.h"
#include "packed.h"
#undef TARGET
#undef NAME

#define SIXTEEN_AT_ONCE
#define TARGET \
    __attribute__((target("avx2,fma,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#define NAME(function) function##_avx512
#include "loops.h"
#include "packed.h"
#undef TARGET
#undef NAME

/* The best set that this processor has, and the operating system saves: 0 base, 1 AVX2, 2 AVX-512. */
EXPORT int64_t level(void) {
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx2 ? (avx512 ? 2 : 1) : 0;
}
#else
EXPORT int64_t level(void) { return 0; }
#endif
