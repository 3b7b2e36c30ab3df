// y = W x straight from the packed bytes of the codec `tiles` (its docstring is the format), W never in memory.
//
// One primitive does all of it: unsigned codes times signed 8-bit digits of x, summed in int32 over one tile, which is
// exact. x is cut into groups of a tile's columns, in the order in which the format stores them, and each group is
// written as a step times integers of D digits:
//
//     D = 1   x ~ step q,                           |q| <= 127
//     D = 3   x ~ step (q0 2^16 + q1 2^8 + q2),     |..| <= 127 * 2^16: float32's precision, of the group's largest
//
// A field of a byte is used where it lies: `v & (mask << shift)` is code * 2^shift <= 255, and the sum over a tile is
// shifted back once. So 64 codes cost one AND and D dot products, where decoding to float32 costs a shift, a
// permutation and a product for 16. What is float32 (a few operations per row and tile) is done in the same
// order by all three instruction sets, without contraction: their results are equal, bit for bit, with any number of
// threads.
//
// Plain C interface, no dependency but the standard library. The caller (`matrix.py`) has checked every length.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define X86 1
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")))
#define AVX2 __attribute__((target("avx2")))
#endif

#ifndef NASHSWARM_SOURCE
#define NASHSWARM_SOURCE "unknown"
#endif

extern "C" struct Matrix {
    const uint8_t *codes;        // as in the file
    const uint8_t *nibbles;      // as in the file: [live tiles][ceil(rows / 2)]
    const uint8_t *bytes;        // as in the file: [live tiles]
    const uint16_t *groups;      // [live tiles]: which group of columns, in file order
    const uint16_t *counts;      // [strips][8]: tiles of each width of WIDTHS
    const int64_t *code_starts;  // [strips]: first byte of a strip's codes
    const int64_t *tile_starts;  // [strips]: first of a strip's live tiles
    const int32_t *order;        // [in]: the column of the matrix at each place
    int32_t out, in, rows, columns;  // rows and columns of a tile
    int32_t base;
};

namespace {

constexpr int WIDTHS[8] = {0, 1, 2, 3, 4, 5, 6, 8};
constexpr int PLANES[4] = {8, 4, 2, 1};
constexpr int MOST_ROWS = 8;                  // of x
constexpr int MOST_VECTORS = 3 * MOST_ROWS;   // digits of all rows of x
constexpr double LARGEST_3 = 127.0 * 65536;
constexpr float LEAST = 0x1p-90f;             // a group of x below it counts as zeros: its steps would be subnormal
constexpr int LARGEST_SIDE = 4096;             // of a tile
constexpr int OFFSET = 223;                   // of `tile`: steps are at most 2^6.6 about a matrix's power of two

// 2^((i - OFFSET - 1) / 8). The steps of a tile's rows are 16 neighbours in it, by nibble, from `tile` + fraction on.
float STEPS[256 + 7 + 16];

// x as digits. Group t of columns holds digits [columns / 4][vectors][4], a row's digits beside each other, highest first.
struct Digits {
    int batch, digits, vectors, groups;
    int8_t *values;
    int32_t *sums;  // [groups][vectors]
    float *steps;   // [groups][batch], halved: products are of 2 (c - m)
};

// --- threads: they sleep on a condition between calls ------------------------------------------------------------

class Pool {
  public:
    // work(i) for i in 0..count - 1, on at most `threads` threads, this one among them.
    void run(int count, int threads, const std::function<void(int)> &work) {
        std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
        if (threads < 2 || count < 2 || !owner.owns_lock()) {  // another call has the pool: go alone
            for (int i = 0; i < count; i++) work(i);
            return;
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (static_cast<int>(workers_) < threads - 1) {
                try {
                    std::thread(&Pool::loop, this).detach();
                } catch (const std::system_error &) {
                    break;  // fewer threads, the same result
                }
                workers_++;
            }
            work_ = &work, count_ = count, next_ = 0, places_ = threads - 1;
        }
        wake_.notify_all();
        take(work, count);
        std::unique_lock<std::mutex> lock(mutex_);
        work_ = nullptr;  // who has not begun by now, need not: after a fork there is nobody who could
        done_.wait(lock, [this] { return active_ == 0; });
    }

  private:
    void take(const std::function<void(int)> &work, int count) {
        for (int i; (i = next_.fetch_add(1)) < count;) work(i);
    }

    void loop() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return work_ && places_ > 0 && next_ < count_; });
            const std::function<void(int)> &work = *work_;  // stays alive while this thread counts as active
            const int count = count_;
            places_--, active_++;
            lock.unlock();
            take(work, count);
            lock.lock();
            if (--active_ == 0) done_.notify_all();
        }
    }

    std::mutex owner_, mutex_;
    std::condition_variable wake_, done_;
    const std::function<void(int)> *work_ = nullptr;
    std::atomic<int> next_{0};
    int count_ = 0, places_ = 0, active_ = 0, workers_ = 0;
};

Pool &pool() {
    static Pool *forever = new Pool;  // its threads outlive main's statics
    return *forever;
}

// --- x -> digits ---------------------------------------------------------------------------------------------------

// One row of x, one group. `place` is the first digit of quad 0; quads lie `stride` bytes apart.
void digits_of(const float *x, int count, int digits, int8_t *place, int stride, int32_t *sums, float *step) {
    float peak = 0;
    bool finite = true;
    for (int c = 0; c < count; c++) {
        peak = std::max(peak, std::fabs(x[c]));
        finite = finite && std::isfinite(x[c]);
    }
    const double largest = digits == 1 ? 127.0 : LARGEST_3;
    const bool some = finite && peak >= LEAST;
    const double factor = some ? largest / static_cast<double>(peak) : 0.0;
    *step = finite ? (some ? static_cast<float>(0.5 * static_cast<double>(peak) / largest) : 0.0f) : NAN;
    for (int d = 0; d < digits; d++) sums[d] = 0;
    for (int c = 0; c < count; c++) {
        int32_t q = some ? static_cast<int32_t>(std::lrint(factor * static_cast<double>(x[c]))) : 0;
        int8_t *to = place + static_cast<int64_t>(c / 4) * stride + c % 4;
        for (int d = digits - 1; d > 0; d--) {  // the lowest digit lies in -128..127, what remains is a whole of 256
            const int32_t low = static_cast<int8_t>(q & 255);
            to[4 * d] = static_cast<int8_t>(low);
            sums[d] += low;
            q = (q - low) / 256;
        }
        to[0] = static_cast<int8_t>(q);
        sums[0] += q;
    }
}

void fill_group(const Matrix &m, const float *x, int t, Digits &to) {
    float group[LARGEST_SIDE];
    const int first = t * m.columns, count = std::min(m.columns, m.in - first);
    for (int b = 0; b < to.batch; b++) {
        std::fill(group, group + m.columns, 0.0f);
        for (int c = 0; c < count; c++) group[c] = x[static_cast<int64_t>(b) * m.in + m.order[first + c]];
        int8_t *place = to.values + static_cast<int64_t>(t) * m.columns * to.vectors + 4 * b * to.digits;
        int32_t *sums = to.sums + t * to.vectors + b * to.digits;
        digits_of(group, m.columns, to.digits, place, 4 * to.vectors, sums, to.steps + t * to.batch + b);
    }
}

// --- one tile ------------------------------------------------------------------------------------------------------
// Every instruction set has `steps`: of LANES rows from `row` on, and their nibbles; and `dots`: sums of c q over the
// columns of a tile for these rows and n vectors of digits, into sums[vector][LANES].

struct Tile {
    const uint8_t *codes;
    int bits, rows, columns;
};

struct Portable {
    static constexpr int LANES = 1;

    static void steps(const uint8_t *nibbles, const float *window, int row, float *step, int32_t *nibble) {
        nibble[0] = nibbles[row / 2] >> (row % 2 * 4) & 15;
        step[0] = nibble[0] ? window[nibble[0]] : 0.0f;
    }

    static void dots(const Tile &tile, int row, const int8_t *x, int vectors, int n, int32_t *sums) {
        for (int v = 0; v < n; v++) sums[v] = 0;
        const uint8_t *plane = tile.codes;
        int above = 0;
        for (int p : PLANES) {
            if (!(tile.bits & p)) continue;
            const int quads = tile.columns * p / 32, mask = (1 << p) - 1;
            for (int j = 0; j < quads; j++)
                for (int k = 0; k < 4; k++) {
                    const int byte = plane[(j * tile.rows + row) * 4 + k];
                    for (int e = 0; e < 8 / p; e++) {
                        const int code = (byte >> (p * e) & mask) << above;
                        const int8_t *at = x + static_cast<int64_t>(j + quads * e) * vectors * 4 + k;
                        for (int v = 0; v < n; v++) sums[v] += code * at[4 * v];
                    }
                }
            plane += static_cast<int64_t>(tile.rows) * tile.columns * p / 8;
            above += p;
        }
    }
};

#ifdef X86

// Bytes of codes to ask for before they are needed. On one core, cold, 4096 x 4096 at 3.25 bits, GB/s with int8 and
// float32 activations: without 6.9 and 5.3; to the first cache 4096 ahead 8.1 and 7.6; to the second one 4096 ahead 9.3
// and 7.8, 8192 ahead 9.4 and 7.9, 16384 ahead 9.3 and 7.8.
constexpr int AHEAD = 8192;

int32_t four(const int8_t *at) {
    int32_t value;
    std::memcpy(&value, at, 4);
    return value;
}

struct Avx2 {
    static constexpr int LANES = 8;

    AVX2 static void steps(const uint8_t *nibbles, const float *window, int row, float *step, int32_t *nibble) {
        const __m128i pairs = _mm_cvtsi32_si128(four(reinterpret_cast<const int8_t *>(nibbles + row / 2)));
        const __m128i low = _mm_set1_epi8(15);
        const __m128i even = _mm_and_si128(pairs, low), odd = _mm_and_si128(_mm_srli_epi16(pairs, 4), low);
        const __m256i all = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd));
        const __m256 some = _mm256_castsi256_ps(_mm256_cmpgt_epi32(all, _mm256_setzero_si256()));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(nibble), all);
        _mm256_storeu_ps(step, _mm256_and_ps(some, _mm256_i32gather_ps(window, all, 4)));
    }

    // Products of two codes below 16 and two digits stay far from the limits of int16, at which maddubs would clip;
    // so a plane of 8 bits goes as two of 4, which share their digits.
    template <int P, int N>
    AVX2 static void plane(const uint8_t *codes, int rows, int columns, const int8_t *x, int vectors, int above,
                           int32_t *sums) {
        constexpr int BITS = P == 8 ? 4 : P;
        const int quads = columns * P / 32;
        const __m256i mask = _mm256_set1_epi8((1 << BITS) - 1), ones = _mm256_set1_epi16(1);
        __m256i sum[N], high[N];
        for (int v = 0; v < N; v++) sum[v] = high[v] = _mm256_setzero_si256();
        for (int j = 0; j < quads; j++) {
            const uint8_t *from = codes + static_cast<int64_t>(j) * rows * 4;
            _mm_prefetch(reinterpret_cast<const char *>(from) + AHEAD, _MM_HINT_T1);
            __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
            for (int e = 0; e < 8 / BITS; e++, bytes = _mm256_srli_epi16(bytes, BITS)) {
                const __m256i code = _mm256_and_si256(bytes, mask);
                const int8_t *at = x + static_cast<int64_t>(P == 8 ? j : j + quads * e) * vectors * 4;
                __m256i *to = P == 8 && e == 1 ? high : sum;
                for (int v = 0; v < N; v++) {
                    const __m256i pairs = _mm256_maddubs_epi16(code, _mm256_set1_epi32(four(at + 4 * v)));
                    to[v] = _mm256_add_epi32(to[v], _mm256_madd_epi16(pairs, ones));
                }
            }
        }
        for (int v = 0; v < N; v++) {
            if (P == 8) sum[v] = _mm256_add_epi32(sum[v], _mm256_slli_epi32(high[v], 4));
            __m256i *to = reinterpret_cast<__m256i *>(sums + 8 * v);
            _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), _mm256_slli_epi32(sum[v], above)));
        }
    }

    template <int N>
    static void planes(const Tile &t, int row, const int8_t *x, int vectors, int32_t *sums) {
        const uint8_t *codes = t.codes + 4 * row;
        int above = 0;
        for (int p : PLANES) {
            if (!(t.bits & p)) continue;
            if (p == 8) plane<8, N>(codes, t.rows, t.columns, x, vectors, above, sums);
            if (p == 4) plane<4, N>(codes, t.rows, t.columns, x, vectors, above, sums);
            if (p == 2) plane<2, N>(codes, t.rows, t.columns, x, vectors, above, sums);
            if (p == 1) plane<1, N>(codes, t.rows, t.columns, x, vectors, above, sums);
            codes += static_cast<int64_t>(t.rows) * t.columns * p / 8;
            above += p;
        }
    }

    static void dots(const Tile &t, int row, const int8_t *x, int vectors, int n, int32_t *sums) {
        std::memset(sums, 0, sizeof(int32_t) * 8 * n);
        int v = 0;
        for (; v + 3 <= n; v += 3) planes<3>(t, row, x + 4 * v, vectors, sums + 8 * v);
        for (; v < n; v++) planes<1>(t, row, x + 4 * v, vectors, sums + 8 * v);
    }
};

typedef int32_t Int16 __attribute__((vector_size(64)));

struct Avx512 {
    static constexpr int LANES = 16;

    AVX512 static void steps(const uint8_t *nibbles, const float *window, int row, float *step, int32_t *nibble) {
        const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(nibbles + row / 2)), low = _mm_set1_epi8(15);
        const __m128i even = _mm_and_si128(pairs, low), odd = _mm_and_si128(_mm_srli_epi16(pairs, 4), low);
        const __m512i all = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd));
        const __mmask16 some = _mm512_test_epi32_mask(all, all);
        _mm512_storeu_si512(nibble, all);
        _mm512_storeu_ps(step, _mm512_maskz_permutexvar_ps(some, all, _mm512_loadu_ps(window)));
    }

    // FIELDS of a byte in one pass over the plane: as many as leave a register for every sum. Few sums are cut in
    // PARTS, so that a dot product does not wait for the last one.
    template <int P, int N>
    AVX512 static inline __attribute__((always_inline)) void plane(const uint8_t *codes, int rows, int columns,
                                                                   const int8_t *x, int vectors, int above,
                                                                   Int16 *sums) {
        constexpr int FIELDS = 8 / P * N <= 16 ? 8 / P : (16 / N >= 4 ? 4 : (16 / N >= 2 ? 2 : 1));
        constexpr int PARTS = FIELDS * N >= 4 ? 1 : (FIELDS * N >= 2 ? 2 : 4);
        const int quads = columns * P / 32;
        const int64_t stride = static_cast<int64_t>(rows) * 4, field = static_cast<int64_t>(quads) * vectors * 4;
        for (int first = 0; first < 8 / P; first += FIELDS) {
            __m512i sum[PARTS][FIELDS][N];
            for (auto &part : sum)
                for (auto &one : part)
                    for (auto &s : one) s = _mm512_setzero_si512();
            __m512i masks[FIELDS];
            for (int e = 0; e < FIELDS; e++) masks[e] = _mm512_set1_epi8(static_cast<char>(((1 << P) - 1) << (P * (first + e))));
            const uint8_t *from = codes;
            const int8_t *at = x + first * field;
            for (int j = 0; j < quads; j += PARTS)
#pragma GCC unroll 4
                for (int u = 0; u < PARTS; u++, from += stride, at += 4 * vectors) {
                    _mm_prefetch(reinterpret_cast<const char *>(from) + AHEAD, _MM_HINT_T1);
                    const __m512i bytes = _mm512_loadu_si512(from);
#pragma GCC unroll 8
                    for (int e = 0; e < FIELDS; e++) {
                        const __m512i code = P == 8 ? bytes : _mm512_and_si512(bytes, masks[e]);
#pragma GCC unroll 8
                        for (int v = 0; v < N; v++)
                            sum[u][e][v] = _mm512_dpbusd_epi32(sum[u][e][v], code, _mm512_set1_epi32(four(at + e * field + 4 * v)));
                    }
                }
#pragma GCC unroll 8
            for (int v = 0; v < N; v++) {
                Int16 all{};
#pragma GCC unroll 8
                for (int e = FIELDS - 1; e >= 0; e--) {
#pragma GCC unroll 4
                    for (int u = 0; u < PARTS; u++) all += reinterpret_cast<Int16>(sum[u][e][v]);
                    if (e > 0) all >>= P;
                }
                sums[v] += all >> (P * first) << above;
            }
        }
    }

    template <int N>
    AVX512 static __attribute__((noinline)) void planes(const Tile &t, int row, const int8_t *x, int vectors, int32_t *to) {
        const uint8_t *codes = t.codes + 4 * row;
        const int64_t eighth = static_cast<int64_t>(t.rows) * t.columns / 8;
        Int16 sums[N] = {};
        int above = 0;
        if (t.bits & 8) plane<8, N>(codes, t.rows, t.columns, x, vectors, above, sums), above += 8, codes += 8 * eighth;
        if (t.bits & 4) plane<4, N>(codes, t.rows, t.columns, x, vectors, above, sums), above += 4, codes += 4 * eighth;
        if (t.bits & 2) plane<2, N>(codes, t.rows, t.columns, x, vectors, above, sums), above += 2, codes += 2 * eighth;
        if (t.bits & 1) plane<1, N>(codes, t.rows, t.columns, x, vectors, above, sums);
        for (int v = 0; v < N; v++) _mm512_storeu_si512(to + 16 * v, reinterpret_cast<__m512i>(sums[v]));
    }

    static void dots(const Tile &t, int row, const int8_t *x, int vectors, int n, int32_t *sums) {
        int v = 0;
        for (; v + 8 <= n; v += 8) planes<8>(t, row, x + 4 * v, vectors, sums + 16 * v);
        switch (n - v) {
            case 7: return planes<7>(t, row, x + 4 * v, vectors, sums + 16 * v);
            case 6: return planes<6>(t, row, x + 4 * v, vectors, sums + 16 * v);
            case 5: return planes<5>(t, row, x + 4 * v, vectors, sums + 16 * v);
            case 4: return planes<4>(t, row, x + 4 * v, vectors, sums + 16 * v);
            case 3: return planes<3>(t, row, x + 4 * v, vectors, sums + 16 * v);
            case 2: return planes<2>(t, row, x + 4 * v, vectors, sums + 16 * v);
            case 1: return planes<1>(t, row, x + 4 * v, vectors, sums + 16 * v);
            default: return;
        }
    }
};

#endif

// --- what is float32, the same for all -----------------------------------------------------------------------------

// y[b][i] += step of the row * step of x * sum over columns of 2 (c - m) q. Loops over i alone become vectors.
template <int LANES>
inline __attribute__((always_inline)) void add(const Digits &x, int group, const int32_t *sums, const float *step,
                                               const int32_t *twice, float *y) {
    const int digits = x.digits, batch = x.batch;
    for (int b = 0; b < batch; b++) {
        const int32_t *own = sums + b * digits * LANES, *all = x.sums + group * x.vectors + b * digits;
        const float unit = x.steps[group * batch + b];
        alignas(64) float value[LANES];
        for (int i = 0; i < LANES; i++) value[i] = static_cast<float>(2 * own[i] - twice[i] * all[0]);
        if (digits == 3) {
            for (int i = 0; i < LANES; i++) {
                value[i] = value[i] * 256.0f + static_cast<float>(2 * own[LANES + i] - twice[i] * all[1]);
                value[i] = value[i] * 256.0f + static_cast<float>(2 * own[2 * LANES + i] - twice[i] * all[2]);
            }
        }
        for (int i = 0; i < LANES; i++) y[b * LANES + i] = y[b * LANES + i] + value[i] * (step[i] * unit);
    }
}

template <class Set>
inline __attribute__((always_inline)) void rows_of_strip(const Matrix &m, const Digits &x, int strip, int row, int fraction,
                                                         float *y) {
    constexpr int LANES = Set::LANES;
    const uint8_t *codes = m.codes + m.code_starts[strip];
    int64_t tile = m.tile_starts[strip];
    const int nibble_bytes = (m.rows + 1) / 2;
    for (int i = 1; i < 8; i++) {
        const int64_t size = static_cast<int64_t>(m.rows) * m.columns * WIDTHS[i] / 8;
        for (int n = 0; n < m.counts[strip * 8 + i]; n++, tile++, codes += size) {
            alignas(64) int32_t sums[MOST_VECTORS * LANES], twice[LANES];
            alignas(64) float step[LANES];
            const int group = m.groups[tile];
            const int8_t *digits = x.values + static_cast<int64_t>(group) * m.columns * x.vectors;
            Set::dots({codes, WIDTHS[i], m.rows, m.columns}, row, digits, x.vectors, x.vectors, sums);
            const int byte = m.bytes[tile];
            Set::steps(m.nibbles + tile * nibble_bytes, STEPS + byte + fraction, row, step, twice);
            for (int r = 0; r < LANES; r++) twice[r] = (1 << WIDTHS[i]) - 1 + ((byte + twice[r]) & 1);
            add<LANES>(x, group, sums, step, twice, y);
        }
    }
}

template <class Set>
inline __attribute__((always_inline)) void strip_of(const Matrix &m, const Digits &x, int strip, float *to) {
    constexpr int LANES = Set::LANES;
    const int above = m.base + OFFSET, power = above >= 0 ? above / 8 : -((7 - above) / 8);
    const float scale = std::ldexp(1.0f, power);
    for (int row = 0; row < m.rows && strip * m.rows + row < m.out; row += LANES) {
        alignas(64) float y[MOST_ROWS * LANES] = {};
        rows_of_strip<Set>(m, x, strip, row, above - 8 * power, y);
        const int first = strip * m.rows + row, count = std::min({LANES, m.rows - row, m.out - first});
        for (int b = 0; b < x.batch; b++)
            for (int i = 0; i < count; i++) to[static_cast<int64_t>(b) * m.out + first + i] = y[b * LANES + i] * scale;
    }
}

void portable(const Matrix &m, const Digits &x, int strip, float *y) { strip_of<Portable>(m, x, strip, y); }
#ifdef X86
AVX2 void avx2(const Matrix &m, const Digits &x, int strip, float *y) { strip_of<Avx2>(m, x, strip, y); }
AVX512 void avx512(const Matrix &m, const Digits &x, int strip, float *y) { strip_of<Avx512>(m, x, strip, y); }
#endif

using Strip = void (*)(const Matrix &, const Digits &, int, float *);

// The set asked for, or the next smaller one that the processor has and whose vectors the tile's rows fill.
Strip choose(int set, int rows) {
#ifdef X86
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (set >= 2 && rows % Avx512::LANES == 0 && wide) return avx512;
    if (set >= 1 && rows % Avx2::LANES == 0 && __builtin_cpu_supports("avx2")) return avx2;
#endif
    (void)set, (void)rows;
    return portable;
}

}  // namespace

extern "C" {

const char *nashswarm_source() { return NASHSWARM_SOURCE; }

// 0 portable, 1 AVX2, 2 AVX-512 VNNI: what `nashswarm_multiply` runs for tiles of this many rows.
int nashswarm_set(int set, int rows) {
    const Strip found = choose(set, rows);
#ifdef X86
    if (found == avx512) return 2;
    if (found == avx2) return 1;
#endif
    return found == portable ? 0 : -1;
}

// x float32 [batch][in] -> y float32 [batch][out]. digits 1 or 3, batch 1 to 8. Returns 0, or 1 for want of memory.
int nashswarm_multiply(const Matrix *m, const float *x, int batch, int digits, int threads, int set, float *y) {
    static const bool ready = [] {
        for (int i = 0; i < 256 + 7 + 16; i++) STEPS[i] = static_cast<float>(std::exp2((i - OFFSET - 1) / 8.0));
        return true;
    }();
    (void)ready;
    try {
        const int groups = (m->in + m->columns - 1) / m->columns, vectors = batch * digits;
        std::vector<int8_t> values(static_cast<size_t>(groups) * m->columns * vectors);
        std::vector<int32_t> sums(static_cast<size_t>(groups) * vectors);
        std::vector<float> steps(static_cast<size_t>(groups) * batch);
        Digits found{batch, digits, vectors, groups, values.data(), sums.data(), steps.data()};
        pool().run(groups, groups * batch < 64 ? 1 : threads, [&](int t) { fill_group(*m, x, t, found); });
        const Strip strip = choose(set, m->rows);
        const int strips = (m->out + m->rows - 1) / m->rows;
        const int together = std::max(1, strips / (16 * threads));  // neighbours in the file, for the prefetcher
        pool().run((strips + together - 1) / together, threads, [&](int i) {
            for (int s = i * together; s < std::min(strips, (i + 1) * together); s++) strip(*m, found, s, y);
        });
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    }
}
}
