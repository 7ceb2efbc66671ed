/* The loops of kernels.c, for one instruction set. They are plain C that compilers turn into vector
instructions: the same numbers in every set. */

/* ---- numbers as float32 ---------------------------------------------------------------------- */

TARGET static inline uint32_t NAME(bits_of)(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

TARGET static inline float NAME(float_of)(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Round to bfloat16, to the nearest and of two such to the even one. */
TARGET static inline uint32_t NAME(half_of)(float value) {
    uint32_t bits = NAME(bits_of)(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return value == value ? rounded : 0x7fc0;
}

/* Return `count` numbers from `start` as float32: in place, or in `room`. */
TARGET static const float *NAME(as_float)(
    const void *data, int64_t kind, int64_t start, int64_t count, float *restrict room) {
    if (kind == FLOAT32)
        return (const float *)data + start;
    const uint16_t *restrict halves = (const uint16_t *)data + start;
    for (int64_t i = 0; i < count; i++)
        room[i] = NAME(float_of)((uint32_t)halves[i] << 16);
    return room;
}

TARGET static void NAME(store)(
    const float *restrict values, void *data, int64_t kind, int64_t start, int64_t count) {
    if (kind == FLOAT32) {
        memcpy((float *)data + start, values, 4 * count);
        return;
    }
    uint16_t *restrict halves = (uint16_t *)data + start;
    for (int64_t i = 0; i < count; i++)
        halves[i] = (uint16_t)NAME(half_of)(values[i]);
}

/* ---- which are kept -------------------------------------------------------------------------- */

/* Magnitudes as integers; those of halves are 15 bits wide. */
TARGET static const int32_t *NAME(sizes)(
    const void *scores, int64_t kind, int64_t start, int64_t count, int32_t *restrict room) {
    if (kind == FLOAT32) {
        const int32_t *restrict words = (const int32_t *)scores + start;
        for (int64_t i = 0; i < count; i++)
            room[i] = words[i] & 0x7fffffff;
    } else {
        const uint16_t *restrict halves = (const uint16_t *)scores + start;
        for (int64_t i = 0; i < count; i++)
            room[i] = halves[i] & 0x7fff;
    }
    return room;
}

/* Write bits as bytes. */
TARGET static void NAME(unpack)(
    const uint8_t *restrict bytes, int64_t start, int64_t count, uint8_t *restrict flag) {
    int64_t i = 0;
    for (; i < count && (start + i) % 8; i++)
        flag[i] = bytes[(start + i) / 8] >> (start + i) % 8 & 1;
    for (; i + 8 <= count; i += 8)
        for (int64_t bit = 0; bit < 8; bit++)
            flag[i + bit] = bytes[(start + i) / 8] >> bit & 1;
    for (; i < count; i++)
        flag[i] = bytes[(start + i) / 8] >> (start + i) % 8 & 1;
}

/* Write 1 for what is kept of a block, 0 for the rest. */
TARGET static void NAME(flags)(
    const choice *chosen, int64_t start, int64_t count, uint8_t *restrict flag) {
    if (chosen->kind == PACKED) {
        NAME(unpack)(chosen->scores, start, count, flag);
        return;
    }
    if (!chosen->by_size) {
        float room[BLOCK], above = chosen->above;
        const float *restrict scores =
            NAME(as_float)(chosen->scores, chosen->kind, start, count, room);
        for (int64_t i = 0; i < count; i++)
            flag[i] = scores[i] > above;
        return;
    }
    int32_t room[BLOCK], cut = (int32_t)chosen->cut;
    const int32_t *restrict size = NAME(sizes)(chosen->scores, chosen->kind, start, count, room);
    int64_t strict = chosen->place - start;
    strict = strict < 0 ? 0 : strict > count ? count : strict;
    for (int64_t i = 0; i < strict; i++)
        flag[i] = size[i] > cut;
    for (int64_t i = strict; i < count; i++)
        flag[i] = size[i] >= cut;
}

typedef struct {
    choice chosen;
    uint8_t *mask;
    int64_t counts[MOST_THREADS];
} NAME(marking);

TARGET static void NAME(mark_part)(void *given, int64_t start, int64_t stop, int64_t part) {
    NAME(marking) *job = given;
    uint8_t room[BLOCK];
    int64_t total = 0;
    for (int64_t at = start; at < stop; at += BLOCK) {
        int64_t count = stop - at < BLOCK ? stop - at : BLOCK;
        uint8_t *restrict flag = job->mask ? job->mask + at : room;
        NAME(flags)(&job->chosen, at, count, flag);
        int32_t found = 0;
        for (int64_t i = 0; i < count; i++)
            found += flag[i];
        total += found;
    }
    job->counts[part] = total;
}

/* Count the ones of a mask of n scores, and write it as bytes unless `mask` is NULL. */
EXPORT TARGET int64_t NAME(mark)(const choice *chosen, int64_t n, int64_t threads, uint8_t *mask) {
    NAME(marking) job = {*chosen, mask, {0}};
    int64_t parts = parts_of(n, threads), total = 0;
    in_parts(NAME(mark_part), &job, n, parts);
    for (int64_t part = 0; part < parts; part++)
        total += job.counts[part];
    return total;
}

/* ---- the cut: the size of one rank, exactly -------------------------------------------------- */

/* Sizes from `low` to `low + span`, kept apart by thread, and how many are smaller. */
typedef struct {
    const void *scores;
    int64_t kind;
    uint32_t low, span, *found[MOST_THREADS];
    int64_t room[MOST_THREADS], counts[MOST_THREADS], below[MOST_THREADS];
} NAME(gathering);

/* Append those of a block's sizes that lie between `low` and `high`, and count the smaller ones. */
TARGET static inline int64_t NAME(gather_block)(
    const int32_t *restrict size, int64_t count, int32_t low, int32_t high,
    uint32_t *restrict found, int64_t *below) {
    int64_t at = 0, taken = 0;
#if defined(EIGHT_AT_ONCE)
    __m256i before = _mm256_set1_epi32(low - 1), last = _mm256_set1_epi32(high);
    for (; at + 8 <= count; at += 8) {
        __m256i sizes = _mm256_loadu_si256((const __m256i *)(size + at));
        __m256i above = _mm256_cmpgt_epi32(sizes, before), over = _mm256_cmpgt_epi32(sizes, last);
        uint64_t reached = (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(above));
        uint64_t inside =
            (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_andnot_si256(over, above)));
        uint64_t bytes = _pdep_u64(inside, 0x0101010101010101) * 0xff;
        __m128i order = _mm_cvtsi64_si128((int64_t)_pext_u64(0x0706050403020100, bytes));
        __m256i packed = _mm256_permutevar8x32_epi32(sizes, _mm256_cvtepu8_epi32(order));
        _mm256_storeu_si256((__m256i *)(found + taken), packed);
        taken += _mm_popcnt_u64(inside);
        *below += 8 - _mm_popcnt_u64(reached);
    }
#endif
    for (; at < count; at++) {
        found[taken] = (uint32_t)size[at];
        taken += size[at] >= low && size[at] <= high;
        *below += size[at] < low;
    }
    return taken;
}

/* A part that may find more than it has room for says -1. */
TARGET static void NAME(gather_part)(void *given, int64_t start, int64_t stop, int64_t part) {
    NAME(gathering) *job = given;
    int32_t room[BLOCK], low = (int32_t)job->low, high = (int32_t)(job->low + job->span);
    int64_t below = 0, found = 0;
    for (int64_t at = start; at < stop; at += BLOCK) {
        int64_t count = stop - at < BLOCK ? stop - at : BLOCK;
        const int32_t *size = NAME(sizes)(job->scores, job->kind, at, count, room);
        if (found + count > job->room[part]) {
            job->counts[part] = -1;
            return;
        }
        found += NAME(gather_block)(size, count, low, high, job->found[part] + found, &below);
    }
    job->below[part] = below;
    job->counts[part] = found;
}

#define DIGIT 11

/* Find the value that has rank `rank`, counted from 0, among keys from `low` to `low + span`; say
how many are smaller and how many equal it. The keys are overwritten. */
TARGET static uint32_t NAME(pick)(
    uint32_t *keys, int64_t n, int64_t rank, uint32_t low, uint32_t span, int64_t *smaller,
    int64_t *equal) {
    int64_t below = 0;
    while (span) {
        int bits = 0;
        while (bits < 32 && span >> bits)
            bits++;
        int shift = bits > DIGIT ? bits - DIGIT : 0;
        int64_t counts[1 << DIGIT] = {0};
        for (int64_t i = 0; i < n; i++)
            counts[(keys[i] - low) >> shift]++;
        uint32_t digit = 0;
        while (below + counts[digit] <= rank)
            below += counts[digit++];
        low += digit << shift;
        span = ((uint32_t)1 << shift) - 1;
        int64_t left = 0;
        for (int64_t i = 0; i < n; i++) {
            uint32_t key = keys[i];
            keys[left] = key;
            left += key - low <= span;
        }
        n = left;
    }
    *smaller = below;
    *equal = n;
    return low;
}

/* Take 4^k scores at uneven distances and look up which sizes stand a little before and after the
wanted rank: so few lie between them that they can be ordered, and the wanted one nearly always. */
TARGET static void NAME(bracket)(
    const void *scores, int64_t kind, int64_t n, int64_t rank, uint32_t *low, uint32_t *span) {
    enum { MOST = 1 << 14 };
    uint32_t top = kind == FLOAT32 ? 0x7fffffff : 0x7fff;
    *low = 0, *span = top;
    int64_t taken = MOST, side = 1 << 7;
    while (taken > 256 && (double)taken * taken * taken > (double)n * n)
        taken >>= 2, side >>= 1;
    uint32_t *keys = n < 4 * taken ? NULL : malloc(2 * sizeof(uint32_t) * taken);
    if (!keys)
        return; /* the whole range is a bracket, too */
    uint32_t *again = keys + taken;
    int64_t stride = n / taken, ignored;
    for (int64_t i = 0; i < taken; i++) {
        int64_t at = i * stride + (int64_t)((uint32_t)i * 2654435761u >> 8) % stride;
        int32_t size;
        NAME(sizes)(scores, kind, at, 1, &size);
        keys[i] = again[i] = (uint32_t)size;
    }
    int64_t middle = (int64_t)((double)rank / n * taken), slack = side * 7 / 4;
    if (middle - slack > 0)
        *low = NAME(pick)(keys, taken, middle - slack, 0, top, &ignored, &ignored);
    uint32_t high = top;
    if (middle + slack < taken)
        high = NAME(pick)(again, taken, middle + slack, 0, top, &ignored, &ignored);
    *span = high - *low;
    free(keys);
}

/* Gather what lies within the bracket and pick from it. Returns 0 if the rank is not there, or there
is no room. */
TARGET static int NAME(search)(
    NAME(gathering) *job, int64_t n, int64_t rank, int64_t threads, int64_t *cut, int64_t *smaller,
    int64_t *equal) {
    int64_t parts = parts_of(n, threads), each = n / parts / 4 + 2 * BLOCK, total = 0, below = 0;
    uint32_t *all = malloc(sizeof(uint32_t) * each * parts);
    int found = all != NULL;
    for (int64_t part = 0; part < parts; part++)
        job->found[part] = all + part * each, job->room[part] = each;
    if (found)
        in_parts(NAME(gather_part), job, n, parts);
    for (int64_t part = 0; part < parts && found; part++) {
        found = job->counts[part] >= 0;
        if (!found)
            break;
        memmove(all + total, job->found[part], sizeof(uint32_t) * job->counts[part]);
        total += job->counts[part];
        below += job->below[part];
    }
    found = found && below <= rank && rank < below + total;
    if (found) {
        *cut = NAME(pick)(all, total, rank - below, job->low, job->span, smaller, equal);
        *smaller += below;
    }
    free(all);
    return found;
}

/* Find what `pick` finds among all sizes, and store none of them: three passes. */
TARGET static void NAME(count)(
    const void *scores, int64_t kind, int64_t n, int64_t rank, int64_t *cut, int64_t *smaller,
    int64_t *equal) {
    uint32_t low = 0, span = kind == FLOAT32 ? 0x7fffffff : 0x7fff;
    int64_t below = 0;
    for (int shift = kind == FLOAT32 ? 2 * DIGIT : DIGIT; shift >= 0; shift -= DIGIT) {
        int64_t counts[1 << DIGIT] = {0};
        int32_t room[BLOCK];
        for (int64_t at = 0; at < n; at += BLOCK) {
            int64_t taken = n - at < BLOCK ? n - at : BLOCK;
            const int32_t *restrict size = NAME(sizes)(scores, kind, at, taken, room);
            for (int64_t i = 0; i < taken; i++)
                if ((uint32_t)size[i] - low <= span)
                    counts[((uint32_t)size[i] - low) >> shift]++;
        }
        uint32_t digit = 0;
        while (below + counts[digit] <= rank)
            below += counts[digit++];
        low += digit << shift;
        span = ((uint32_t)1 << shift) - 1;
        *equal = counts[digit];
    }
    *cut = low;
    *smaller = below;
}

/* Return where the `wanted`-th score of this size lies, counted from 1. */
TARGET static int64_t NAME(find_equal)(
    const void *scores, int64_t kind, int64_t n, int64_t cut, int64_t wanted) {
    int32_t room[BLOCK], key = (int32_t)cut;
    for (int64_t at = 0; at < n; at += BLOCK) {
        int64_t count = n - at < BLOCK ? n - at : BLOCK, i = 0;
        const int32_t *restrict size = NAME(sizes)(scores, kind, at, count, room);
        int32_t equal = 0;
        for (i = 0; i < count; i++)
            equal += size[i] == key;
        if (equal < wanted) {
            wanted -= equal;
            continue;
        }
        for (i = 0; wanted; i++)
            wanted -= size[i] == key;
        return at + i - 1;
    }
    return n;
}

/* Choose which of n scores are dropped: the `dropped` smallest by (size, index), 0 < dropped <= n.
Writes cut and place of the choice: of the scores of the cut's size those before the place go. */
EXPORT TARGET void NAME(choose)(choice *chosen, int64_t n, int64_t dropped, int64_t threads) {
    NAME(gathering) job = {.scores = chosen->scores, .kind = chosen->kind};
    int64_t smaller, equal, rank = dropped - 1;
    NAME(bracket)(chosen->scores, chosen->kind, n, rank, &job.low, &job.span);
    if (!NAME(search)(&job, n, rank, threads, &chosen->cut, &smaller, &equal))
        NAME(count)(chosen->scores, chosen->kind, n, rank, &chosen->cut, &smaller, &equal);
    chosen->place = dropped - smaller == equal
        ? n
        : NAME(find_equal)(chosen->scores, chosen->kind, n, chosen->cut, dropped - smaller) + 1;
}

/* ---- the product and its gradients ----------------------------------------------------------- */

/* How many numbers from `at` can be taken together, and where they begin in the weight. */
TARGET static inline int64_t NAME(step)(
    const numbers *weight, int64_t at, int64_t stop, int64_t *place) {
    *place = at % weight->period;
    int64_t count = stop - at < BLOCK ? stop - at : BLOCK;
    return weight->period - *place < count ? weight->period - *place : count;
}

typedef struct {
    choice chosen;
    numbers weight;
    void *out;
    int64_t out_kind, scaled;
    float scale;
} NAME(producing);

TARGET static void NAME(product_part)(void *given, int64_t start, int64_t stop, int64_t part) {
    NAME(producing) *job = given;
    float kept_room[BLOCK], room[BLOCK], scale = job->scale;
    uint8_t flag[BLOCK];
    int64_t count, place;
    (void)part;
    for (int64_t at = start; at < stop; at += count) {
        count = NAME(step)(&job->weight, at, stop, &place);
        NAME(flags)(&job->chosen, at, count, flag);
        const float *restrict weight =
            NAME(as_float)(job->weight.data, job->weight.kind, place, count, room);
        float *restrict kept = job->out_kind == FLOAT32 ? (float *)job->out + at : kept_room;
        if (job->scaled)
            for (int64_t i = 0; i < count; i++)
                kept[i] = weight[i] * (float)flag[i] * scale;
        else
            for (int64_t i = 0; i < count; i++)
                kept[i] = weight[i] * (float)flag[i];
        if (job->out_kind != FLOAT32)
            NAME(store)(kept, job->out, job->out_kind, at, count);
    }
}

/* Write weight x mask (x scale) of n weights. */
EXPORT TARGET void NAME(product)(
    const choice *chosen, const numbers *weight, int64_t n, int64_t scaled, float scale,
    int64_t threads, void *out, int64_t out_kind) {
    NAME(producing) job = {*chosen, *weight, out, out_kind, scaled, scale};
    in_parts(NAME(product_part), &job, n, parts_of(n, threads));
}

typedef struct {
    numbers grad, weight;
    const void *scores;
    const uint8_t *mask;
    void *out;
    int64_t kind, by_size, scaled;
    float scale, shift;
    double sums[MOST_THREADS];
} NAME(grading);

/* Write dL/dM: grad x weight, rounded to the type that torch gives the product and to the scores'. */
TARGET static void NAME(pull)(
    NAME(grading) *job, int64_t at, int64_t place, int64_t count, float *restrict through) {
    float of_grad[BLOCK], of_weight[BLOCK];
    const float *restrict grad =
        NAME(as_float)(job->grad.data, job->grad.kind, at, count, of_grad);
    const float *restrict weight =
        NAME(as_float)(job->weight.data, job->weight.kind, place, count, of_weight);
    for (int64_t i = 0; i < count; i++)
        through[i] = grad[i] * weight[i];
    if (job->kind != FLOAT32 || (job->grad.kind != FLOAT32 && job->weight.kind != FLOAT32))
        for (int64_t i = 0; i < count; i++)
            through[i] = NAME(float_of)(NAME(half_of)(through[i]) << 16);
}

TARGET static void NAME(grad_part)(void *given, int64_t start, int64_t stop, int64_t part) {
    NAME(grading) *job = given;
    float through[BLOCK], room[BLOCK], scale = job->scale, shift = job->shift;
    int64_t count, place;
    (void)part;
    for (int64_t at = start; at < stop; at += count) {
        count = NAME(step)(&job->weight, at, stop, &place);
        NAME(pull)(job, at, place, count, through);
        if (job->scaled)
            for (int64_t i = 0; i < count; i++)
                through[i] = through[i] * scale - shift;
        if (job->by_size) {
            const float *restrict scores =
                NAME(as_float)(job->scores, job->kind, at, count, room);
            for (int64_t i = 0; i < count; i++)
                through[i] *= (float)((scores[i] > 0) - (scores[i] < 0));
        }
        NAME(store)(through, job->out, job->kind, at, count);
    }
}

/* Write dL/dS of n scores of type `kind`: dL/dM (x scale - shift) (x sign of the score). */
EXPORT TARGET void NAME(grad)(
    const numbers *grad, const numbers *weight, const void *scores, int64_t kind, int64_t n,
    int64_t by_size, int64_t scaled, float scale, float shift, int64_t threads, void *out) {
    NAME(grading) job = {.grad = *grad, .weight = *weight, .scores = scores, .out = out,
                         .kind = kind, .by_size = by_size, .scaled = scaled, .scale = scale,
                         .shift = shift};
    in_parts(NAME(grad_part), &job, n, parts_of(n, threads));
}

TARGET static void NAME(sum_part)(void *given, int64_t start, int64_t stop, int64_t part) {
    NAME(grading) *job = given;
    float through[BLOCK];
    int64_t count, place;
    double total = 0;
    for (int64_t at = start; at < stop; at += count) {
        count = NAME(step)(&job->weight, at, stop, &place);
        NAME(pull)(job, at, place, count, through);
        double lanes[8] = {0};
        for (int64_t i = 0; i < count; i++)
            through[i] *= (float)(int32_t)job->mask[at + i];
        for (int64_t i = 0; i < count; i++)
            lanes[i % 8] += through[i];
        for (int64_t i = 0; i < 8; i++)
            total += lanes[i];
    }
    job->sums[part] = total;
}

/* Return the sum of dL/dM over what a mask of bytes keeps. */
EXPORT TARGET double NAME(kept_sum)(
    const numbers *grad, const numbers *weight, const uint8_t *mask, int64_t n, int64_t threads) {
    NAME(grading) job = {.grad = *grad, .weight = *weight, .mask = mask};
    int64_t parts = parts_of(n, threads);
    double total = 0;
    in_parts(NAME(sum_part), &job, n, parts);
    for (int64_t part = 0; part < parts; part++)
        total += job.sums[part];
    return total;
}
