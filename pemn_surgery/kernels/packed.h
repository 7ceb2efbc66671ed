/* Products of a packed weight with few inputs, for one instruction set: sums that are looked up.

Rows of a weight that begin at the same number of the bank (a phase) differ by their masks alone, so
all of them sum some of the same products z = number x input. Of four neighbouring columns there
are 16 sums, which make a table; four bits of a row's mask say which of them to add. A table serves
every row of the phase, and 16 rows look into it at once.

The mask lies in tiles of 16 rows and 32 columns: one word a row, its lowest bit the first column. */

#define TILE_ROWS 16
#define TILE_COLUMNS 32
#define CHUNK 1024 /* columns whose tables (16 kB) stay in the first cache */

typedef struct {
    const uint32_t *words;   /* [phases][blocks][tiles][16] */
    const float *rows;       /* [phases][columns]: the numbers of a phase's rows */
    const float *inputs;     /* [samples][columns] */
    float *outputs;          /* [samples][count]; row r is of phase r % phases */
    int64_t phases, blocks, columns, samples, count;
    int64_t failed[MOST_THREADS];
} NAME(looking);

/* Write the 16 sums of four products; of equal numbers the same bits in every set. */
TARGET static inline void NAME(sums_of)(const float *restrict z, float *restrict sums) {
#if defined(SIXTEEN_AT_ONCE)
    __m512 all = _mm512_maskz_mov_ps(0xaaaa, _mm512_set1_ps(z[0]));
    all = _mm512_mask_add_ps(all, 0xcccc, all, _mm512_set1_ps(z[1]));
    all = _mm512_mask_add_ps(all, 0xf0f0, all, _mm512_set1_ps(z[2]));
    all = _mm512_mask_add_ps(all, 0xff00, all, _mm512_set1_ps(z[3]));
    _mm512_storeu_ps(sums, all);
#elif defined(EIGHT_AT_ONCE)
    const __m256 odd = _mm256_castsi256_ps(_mm256_setr_epi32(0, -1, 0, -1, 0, -1, 0, -1));
    const __m256 pairs = _mm256_castsi256_ps(_mm256_setr_epi32(0, 0, -1, -1, 0, 0, -1, -1));
    const __m256 last = _mm256_castsi256_ps(_mm256_setr_epi32(0, 0, 0, 0, -1, -1, -1, -1));
    __m256 all = _mm256_and_ps(_mm256_set1_ps(z[0]), odd);
    all = _mm256_add_ps(all, _mm256_and_ps(_mm256_set1_ps(z[1]), pairs));
    all = _mm256_add_ps(all, _mm256_and_ps(_mm256_set1_ps(z[2]), last));
    _mm256_storeu_ps(sums, all);
    _mm256_storeu_ps(sums + 8, _mm256_add_ps(all, _mm256_set1_ps(z[3])));
#else
    sums[0] = 0.0f;
    sums[1] = z[0];
    for (int64_t i = 0; i < 2; i++)
        sums[2 + i] = sums[i] + z[1];
    for (int64_t i = 0; i < 4; i++)
        sums[4 + i] = sums[i] + z[2];
    for (int64_t i = 0; i < 8; i++)
        sums[8 + i] = sums[i] + z[3];
#endif
}

/* Write the 16 sums of each four columns from `start`; columns behind the last are zero. */
TARGET static void NAME(tables)(
    const float *restrict row, const float *restrict input, int64_t start, int64_t width,
    int64_t columns, float *restrict table) {
    float z[CHUNK];
    int64_t there = columns - start < width ? columns - start : width;
    for (int64_t i = 0; i < there; i++)
        z[i] = row[start + i] * input[start + i];
    for (int64_t i = there; i < width; i++)
        z[i] = 0.0f;
    for (int64_t group = 0; group < width / 4; group++)
        NAME(sums_of)(z + 4 * group, table + 16 * group);
}

/* Add to the sums of `blocks` times 16 rows what `tiles` words of each row say; a block's words lie
`stride` behind those of the one before. Several blocks at once keep the adders busy: each addition
to a sum waits for the one before. */
#if defined(SIXTEEN_AT_ONCE)
#define AT_ONCE 4

TARGET static INLINE void NAME(look)(
    const uint32_t *restrict words, int64_t stride, int64_t tiles, int64_t blocks,
    const float *restrict table, float *restrict sums) {
    __m512 total[AT_ONCE];
    for (int64_t block = 0; block < blocks; block++)
        total[block] = _mm512_loadu_ps(sums + TILE_ROWS * block);
    for (int64_t tile = 0; tile < tiles; tile++) {
        __m512i word[AT_ONCE];
        for (int64_t block = 0; block < blocks; block++)
            word[block] = _mm512_loadu_si512(words + stride * block + TILE_ROWS * tile);
        for (int64_t group = 0; group < 8; group++) {
            __m512 of_group = _mm512_loadu_ps(table + 128 * tile + 16 * group);
            for (int64_t block = 0; block < blocks; block++) {
                __m512 found = _mm512_permutexvar_ps(word[block], of_group);
                total[block] = _mm512_add_ps(total[block], found);
                word[block] = _mm512_srli_epi32(word[block], 4);
            }
        }
    }
    for (int64_t block = 0; block < blocks; block++)
        _mm512_storeu_ps(sums + TILE_ROWS * block, total[block]);
}
#elif defined(EIGHT_AT_ONCE)
#define AT_ONCE 2

TARGET static INLINE void NAME(look)(
    const uint32_t *restrict words, int64_t stride, int64_t tiles, int64_t blocks,
    const float *restrict table, float *restrict sums) {
    __m256 total[2 * AT_ONCE];
    for (int64_t half = 0; half < 2 * blocks; half++)
        total[half] = _mm256_loadu_ps(sums + 8 * half);
    for (int64_t tile = 0; tile < tiles; tile++) {
        __m256i word[2 * AT_ONCE];
        for (int64_t half = 0; half < 2 * blocks; half++)
            word[half] = _mm256_loadu_si256((const __m256i *)(
                words + stride * (half / 2) + TILE_ROWS * tile + 8 * (half % 2)));
        for (int64_t group = 0; group < 8; group++) {
            const float *of_group = table + 128 * tile + 16 * group;
            __m256 first = _mm256_loadu_ps(of_group), last = _mm256_loadu_ps(of_group + 8);
            for (int64_t half = 0; half < 2 * blocks; half++) {
                __m256 low = _mm256_permutevar8x32_ps(first, word[half]);
                __m256 high = _mm256_permutevar8x32_ps(last, word[half]);
                __m256 which = _mm256_castsi256_ps(_mm256_slli_epi32(word[half], 28));
                total[half] = _mm256_add_ps(total[half], _mm256_blendv_ps(low, high, which));
                word[half] = _mm256_srli_epi32(word[half], 4);
            }
        }
    }
    for (int64_t half = 0; half < 2 * blocks; half++)
        _mm256_storeu_ps(sums + 8 * half, total[half]);
}
#else
#define AT_ONCE 1

TARGET static void NAME(look)(
    const uint32_t *restrict words, int64_t stride, int64_t tiles, int64_t blocks,
    const float *restrict table, float *restrict sums) {
    (void)stride, (void)blocks;
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t lane = 0; lane < TILE_ROWS; lane++) {
            uint32_t word = words[TILE_ROWS * tile + lane];
            for (int64_t group = 0; group < 8; group++, word >>= 4)
                sums[lane] += table[128 * tile + 16 * group + (word & 15)];
        }
}
#endif

/* Make the outputs of the row blocks from `start` of one phase, for all samples. */
TARGET static void NAME(look_phase)(
    const NAME(looking) *job, int64_t phase, int64_t start, int64_t stop, float *restrict sums,
    float *restrict table) {
    int64_t tiles = (job->columns + TILE_COLUMNS - 1) / TILE_COLUMNS, each = CHUNK / TILE_COLUMNS;
    const uint32_t *words = job->words + phase * job->blocks * tiles * TILE_ROWS;
    const float *row = job->rows + phase * job->columns;
    for (int64_t sample = 0; sample < job->samples; sample++) {
        memset(sums, 0, sizeof(float) * (stop - start) * TILE_ROWS);
        for (int64_t tile = 0; tile < tiles; tile += each) {
            int64_t taken = tiles - tile < each ? tiles - tile : each;
            NAME(tables)(row, job->inputs + sample * job->columns, tile * TILE_COLUMNS,
                         taken * TILE_COLUMNS, job->columns, table);
            int64_t block = start, stride = tiles * TILE_ROWS;
            for (; block + AT_ONCE <= stop; block += AT_ONCE)
                NAME(look)(words + block * stride + tile * TILE_ROWS, stride, taken, AT_ONCE, table,
                           sums + (block - start) * TILE_ROWS);
            for (; block < stop; block++)
                NAME(look)(words + block * stride + tile * TILE_ROWS, stride, taken, 1, table,
                           sums + (block - start) * TILE_ROWS);
        }
        float *restrict output = job->outputs + sample * job->count;
        for (int64_t lane = 0; lane < (stop - start) * TILE_ROWS; lane++) {
            int64_t at = (start * TILE_ROWS + lane) * job->phases + phase;
            if (at < job->count)
                output[at] = sums[lane];
        }
    }
}

/* A part of all phases' row blocks. A part that has no room for its sums says so. */
TARGET static void NAME(look_part)(void *given, int64_t start, int64_t stop, int64_t part) {
    NAME(looking) *job = given;
    float *room = malloc(sizeof(float) * (TILE_ROWS * job->blocks + CHUNK / 4 * 16));
    job->failed[part] = room == NULL;
    for (int64_t at = start; room != NULL && at < stop;) {
        int64_t phase = at / job->blocks, first = at % job->blocks;
        int64_t last = first + stop - at < job->blocks ? first + stop - at : job->blocks;
        NAME(look_phase)(job, phase, first, last, room + CHUNK / 4 * 16, room);
        at += last - first;
    }
    free(room);
}

/* Write inputs x (rows x mask)^T of a packed weight. Returns 0, or 1 if there was no room. */
EXPORT TARGET int64_t NAME(look_up)(
    const uint32_t *words, const float *rows, const float *inputs, int64_t phases, int64_t blocks,
    int64_t columns, int64_t samples, int64_t count, int64_t threads, float *outputs) {
    NAME(looking) job = {.words = words, .rows = rows, .inputs = inputs, .outputs = outputs,
                         .phases = phases, .blocks = blocks, .columns = columns,
                         .samples = samples, .count = count};
    int64_t parts = parts_of(count * columns * samples, threads), failed = 0;
    if (parts > phases * blocks)
        parts = phases * blocks;
    in_parts(NAME(look_part), &job, phases * blocks, parts);
    for (int64_t part = 0; part < parts; part++)
        failed |= job.failed[part];
    return failed;
}

/* ---- without anything shared: numbers under a mask, times inputs ------------------------------ */

/* Sums are kept in 16 lanes, column j in lane j % 16, whatever a processor adds at once, and are
summed up in one order at the end: the same bits in every set. */
#define LANES 16

typedef struct {
    const uint8_t *bits;   /* a bit a weight, row by row, the lowest of a byte first */
    const float *numbers;  /* row r begins at r x columns % period, and is there as a whole */
    const float *inputs;   /* [samples][columns] */
    float *outputs;        /* [samples][count] */
    int64_t period, columns, samples, count;
} NAME(dotting);

/* The bits of 16 weights from `at`; what lies behind the last byte is not read. */
TARGET static inline uint32_t NAME(sixteen)(const uint8_t *bits, int64_t at, int64_t bytes) {
    int64_t first = at / 8;
    uint32_t word = 0;
    if (first + 4 <= bytes)
        memcpy(&word, bits + first, 4);
    else
        for (int64_t i = 0; first + i < bytes; i++)
            word |= (uint32_t)bits[first + i] << 8 * i;
    return word >> at % 8 & 0xffff;
}

/* 16 floats, in registers. */
#if defined(SIXTEEN_AT_ONCE)
typedef struct {
    __m512 all;
} NAME(lanes);

TARGET static inline NAME(lanes) NAME(kept)(uint32_t mask, const float *numbers) {
    return (NAME(lanes)){_mm512_maskz_loadu_ps((__mmask16)mask, numbers)};
}

TARGET static inline NAME(lanes) NAME(plus)(
    NAME(lanes) sums, NAME(lanes) kept, const float *inputs) {
    sums.all = _mm512_add_ps(sums.all, _mm512_mul_ps(kept.all, _mm512_loadu_ps(inputs)));
    return sums;
}

TARGET static inline void NAME(put)(NAME(lanes) sums, float *room) {
    _mm512_storeu_ps(room, sums.all);
}
#elif defined(EIGHT_AT_ONCE)
typedef struct {
    __m256 low, high;
} NAME(lanes);

TARGET static inline __m256 NAME(kept_half)(uint32_t mask, const float *numbers) {
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i asked = _mm256_and_si256(_mm256_set1_epi32((int32_t)mask), each);
    __m256 flag = _mm256_castsi256_ps(_mm256_cmpeq_epi32(asked, each));
    return _mm256_and_ps(_mm256_loadu_ps(numbers), flag);
}

TARGET static inline NAME(lanes) NAME(kept)(uint32_t mask, const float *numbers) {
    return (NAME(lanes)){
        NAME(kept_half)(mask, numbers), NAME(kept_half)(mask >> 8, numbers + 8)};
}

TARGET static inline NAME(lanes) NAME(plus)(
    NAME(lanes) sums, NAME(lanes) kept, const float *inputs) {
    sums.low = _mm256_add_ps(sums.low, _mm256_mul_ps(kept.low, _mm256_loadu_ps(inputs)));
    sums.high = _mm256_add_ps(sums.high, _mm256_mul_ps(kept.high, _mm256_loadu_ps(inputs + 8)));
    return sums;
}

TARGET static inline void NAME(put)(NAME(lanes) sums, float *room) {
    _mm256_storeu_ps(room, sums.low);
    _mm256_storeu_ps(room + 8, sums.high);
}
#else
typedef struct {
    float all[LANES];
} NAME(lanes);

TARGET static inline NAME(lanes) NAME(kept)(uint32_t mask, const float *numbers) {
    NAME(lanes) kept;
    for (int64_t lane = 0; lane < LANES; lane++)
        kept.all[lane] = mask >> lane & 1 ? numbers[lane] : 0.0f;
    return kept;
}

TARGET static inline NAME(lanes) NAME(plus)(
    NAME(lanes) sums, NAME(lanes) kept, const float *inputs) {
    for (int64_t lane = 0; lane < LANES; lane++)
        sums.all[lane] += kept.all[lane] * inputs[lane];
    return sums;
}

TARGET static inline void NAME(put)(NAME(lanes) sums, float *room) {
    memcpy(room, sums.all, sizeof(sums.all));
}
#endif

/* Add the columns behind the last whole 16, and sum up. */
TARGET static float NAME(dot_end)(
    NAME(lanes) sums, uint32_t mask, const float *numbers, const float *inputs, int64_t count) {
    float room[LANES];
    NAME(put)(sums, room);
    for (int64_t lane = 0; lane < count; lane++)
        room[lane] += (mask >> lane & 1 ? numbers[lane] : 0.0f) * inputs[lane];
    for (int64_t half = LANES / 2; half; half /= 2)
        for (int64_t lane = 0; lane < half; lane++)
            room[lane] += room[lane + half];
    return room[0];
}

/* Make the outputs of up to four rows and inputs: constants where this is inlined, so that all sums
are in registers. */
TARGET static INLINE void NAME(dot_tile)(
    const NAME(dotting) *job, int64_t row, const int rows, int64_t sample, const int samples) {
    NAME(lanes) sums[4][4] = {0};
    int64_t columns = job->columns, whole = columns / LANES * LANES;
    int64_t bytes = (job->count * columns + 7) / 8;
    const float *inputs = job->inputs + sample * columns, *numbers[4];
    for (int i = 0; i < rows; i++)
        numbers[i] = job->numbers + (row + i) * columns % job->period;
    int64_t j = 0, pairs = columns / (2 * LANES) * (2 * LANES);
    /* Eight bytes hold 32 bits wherever these begin; behind the last row's there may be fewer. */
    int64_t safe = ((row + rows) * columns + 7) / 8 + 8 <= bytes ? pairs : 0;
    for (; j < safe; j += 2 * LANES)
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            int64_t at = (row + i) * columns + j;
            uint64_t word;
            memcpy(&word, job->bits + at / 8, 8);
            word >>= at % 8;
            NAME(lanes) first = NAME(kept)(word & 0xffff, numbers[i] + j);
            NAME(lanes) second = NAME(kept)(word >> LANES & 0xffff, numbers[i] + j + LANES);
#pragma GCC unroll 4
            for (int k = 0; k < samples; k++) {
                const float *input = inputs + k * columns + j;
                sums[i][k] = NAME(plus)(sums[i][k], first, input);
                sums[i][k] = NAME(plus)(sums[i][k], second, input + LANES);
            }
        }
    for (; j < whole; j += LANES)
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            uint32_t mask = NAME(sixteen)(job->bits, (row + i) * columns + j, bytes);
            NAME(lanes) kept = NAME(kept)(mask, numbers[i] + j);
#pragma GCC unroll 4
            for (int k = 0; k < samples; k++)
                sums[i][k] = NAME(plus)(sums[i][k], kept, inputs + k * columns + j);
        }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
        int64_t left = columns - whole, at = (row + i) * columns + whole;
        uint32_t mask = left ? NAME(sixteen)(job->bits, at, bytes) : 0;
#pragma GCC unroll 4
        for (int k = 0; k < samples; k++)
            job->outputs[(sample + k) * job->count + row + i] = NAME(dot_end)(
                sums[i][k], mask, numbers[i] + whole, inputs + k * columns + whole, left);
    }
}

TARGET static void NAME(dot_part)(void *given, int64_t start, int64_t stop, int64_t part) {
    const NAME(dotting) *job = given;
    (void)part;
    int64_t row = start;
    for (; row + 4 <= stop; row += 4) {
        int64_t sample = 0;
        for (; sample + 4 <= job->samples; sample += 4)
            for (int64_t i = 0; i < 4; i++)
                NAME(dot_tile)(job, row + i, 1, sample, 4);
        for (; sample < job->samples; sample++)
            NAME(dot_tile)(job, row, 4, sample, 1);
    }
    for (; row < stop; row++)
        for (int64_t sample = 0; sample < job->samples; sample++)
            NAME(dot_tile)(job, row, 1, sample, 1);
}

/* Write inputs x (numbers x mask)^T. */
EXPORT TARGET void NAME(dot_rows)(
    const uint8_t *bits, const float *numbers, int64_t period, const float *inputs,
    int64_t columns, int64_t samples, int64_t count, int64_t threads, float *outputs) {
    NAME(dotting) job = {.bits = bits, .numbers = numbers, .inputs = inputs, .outputs = outputs,
                         .period = period, .columns = columns, .samples = samples,
                         .count = count};
    int64_t parts = parts_of(count * columns * samples, threads);
    in_parts(NAME(dot_part), &job, count, parts > count ? count : parts);
}

#undef LANES
#undef AT_ONCE
#undef TILE_ROWS
#undef TILE_COLUMNS
#undef CHUNK
