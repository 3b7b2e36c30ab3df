// y = W x straight from the packed bytes of the codec `tiles` (its docstring is the format), W never in memory; a row of
// W; and what stands between the products of a block of GPT-2, so that a token goes through all blocks in one call.
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
// Plain C interface, no dependency but the standard library. The callers (`matrix.py`, `writing.py`) have checked every length.

#include <algorithm>
#include <atomic>
#include <chrono>
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

struct Norm {
    const float *weight, *bias;
    float epsilon;
};

// A block of GPT-2's make: x + attention(norm x), then that + mlp(norm that).
extern "C" struct Block {
    const Matrix *qkv, *out, *up, *down;
    const float *qkv_bias, *out_bias, *up_bias, *down_bias;  // or null
    Norm norms[2];
    int32_t width, heads;
    float scale;    // of products of queries and keys
    int32_t exact;  // GELU by erf, else by tanh
};

// What a block keeps of tokens.
extern "C" struct Past {
    float *keys, *values;  // [heads][room][width / heads]
    int64_t room;
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

// --- threads: they look out for the next call for a while, then sleep ---------------------------------------------

constexpr auto LOOK_OUT = std::chrono::microseconds(200);  // the steps of a block follow each other within 100

inline void pause() {
#ifdef X86
    _mm_pause();
#endif
}

class Pool {
  public:
    // Have helpers that sleep look out: waking one takes as long as much of a product.
    void call_up() {
        if (asleep_ == 0) return;
        calls_++;
        notify();
    }

    // work(i) for i in 0..count - 1, on at most `threads` threads, this one among them.
    void run(int count, int threads, const std::function<void(int)> &work) {
        std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
        if (threads < 2 || count < 2 || !owner.owns_lock()) {  // another call has the pool: go alone
            for (int i = 0; i < count; i++) work(i);
            return;
        }
        hire(std::min(threads - 1, MOST_HELPERS));
        work_ = &work, count_ = count, next_ = 0;
        state_ = ((state_ >> 32) + 1) << 32 | static_cast<uint64_t>(std::min(threads - 1, MOST_HELPERS)) << 16;
        if (asleep_ > 0) notify();
        take(work, count);
        state_ &= ~PLACES;  // who has not begun by now, need not: after a fork there is nobody who could
        for (int looks = 0; state_ & ACTIVE; looks++) looks < 1000 ? pause() : std::this_thread::yield();
    }

  private:
    // state_: the number of the call (32 bits), how many more may help with it (16), how many do (16).
    static constexpr uint64_t ACTIVE = 0xffff, PLACES = ACTIVE << 16, PLACE = 1 << 16;
    static constexpr int MOST_HELPERS = 1024;

    void hire(int helpers) {
        while (helpers_ < helpers) {
            try {
                std::thread(&Pool::loop, this).detach();
            } catch (const std::system_error &) {
                break;  // fewer threads, the same result
            }
            helpers_++;
        }
    }

    void notify() {
        { std::lock_guard<std::mutex> lock(mutex_); }  // who counts as asleep has looked, or will see what is new
        wake_.notify_all();
    }

    void take(const std::function<void(int)> &work, int count) {
        for (int i; (i = next_.fetch_add(1)) < count;) work(i);
    }

    bool open(uint64_t seen) const {
        const uint64_t state = state_;
        return state >> 32 != seen && state & PLACES;
    }

    void await(uint64_t seen) {
        while (true) {
            const uint64_t calls = calls_;
            const auto until = std::chrono::steady_clock::now() + LOOK_OUT;
            do {
                for (int i = 0; i < 32; i++, pause())
                    if (open(seen)) return;
            } while (std::chrono::steady_clock::now() < until);
            std::unique_lock<std::mutex> lock(mutex_);
            asleep_++;
            wake_.wait(lock, [&] { return open(seen) || calls_ != calls; });
            asleep_--;
        }
    }

    void loop() {
        for (uint64_t seen = 0;;) {
            await(seen);
            uint64_t state = state_;
            while (state & PLACES && !state_.compare_exchange_weak(state, state - PLACE + 1)) {
            }
            seen = state >> 32;
            if (!(state & PLACES)) continue;
            take(*work_, count_);  // both stay as they are while this thread counts as active
            state_--;
        }
    }

    std::mutex owner_, mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> state_{0}, calls_{0};
    std::atomic<int> next_{0}, asleep_{0};
    const std::function<void(int)> *work_ = nullptr;
    int count_ = 0, helpers_ = 0;
};

Pool &pool() {
    static Pool *forever = new Pool;  // its threads outlive main's statics
    return *forever;
}

// --- x -> digits ---------------------------------------------------------------------------------------------------

#define INLINE inline __attribute__((always_inline))  // into functions of an instruction set

template <class To, class From>
INLINE To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

// One row of x, one group. `place` is the first digit of quad 0; quads lie `stride` bytes apart. Loops over c alone
// become vectors: the largest is found among bits, where order is that of positive numbers, and adding 1.5 * 2^52
// rounds to whole numbers, ties to even.
INLINE void digits_of(const float *x, int count, int digits, int8_t *place, int stride, int32_t *sums, float *step) {
    int32_t top = 0;
    for (int c = 0; c < count; c++) top = std::max(top, bits_of<int32_t>(x[c]) & 0x7fffffff);
    const float peak = bits_of<float>(top);
    const double largest = digits == 1 ? 127.0 : LARGEST_3;
    const bool finite = top < 0x7f800000, some = finite && peak >= LEAST;
    const double factor = some ? largest / static_cast<double>(peak) : 0.0;
    *step = finite ? (some ? static_cast<float>(0.5 * static_cast<double>(peak) / largest) : 0.0f) : NAN;
    constexpr double WHOLE = 0x1.8p52;
    int32_t whole[LARGEST_SIDE];
    int8_t digit[LARGEST_SIDE];
    if (some) {
        for (int c = 0; c < count; c++) {
            whole[c] = static_cast<int32_t>((factor * static_cast<double>(x[c]) + WHOLE) - WHOLE);
        }
    } else {
        std::fill(whole, whole + count, 0);
    }
    for (int d = digits - 1; d >= 0; d--) {  // the lowest digit lies in -128..127, what remains is a whole of 256
        int32_t sum = 0;
        for (int c = 0; c < count; c++) {
            digit[c] = static_cast<int8_t>(whole[c]);
            whole[c] = (whole[c] - digit[c]) / 256;
            sum += digit[c];
        }
        sums[d] = sum;
        for (int j = 0; j < count / 4; j++) std::memcpy(place + static_cast<int64_t>(j) * stride + 4 * d, digit + 4 * j, 4);
    }
}

INLINE void fill_group(const Matrix &m, const float *x, int t, const Digits &to) {
    float group[LARGEST_SIDE];
    const int first = t * m.columns, count = std::min(m.columns, m.in - first);
    std::fill(group + count, group + m.columns, 0.0f);
    for (int b = 0; b < to.batch; b++) {
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
    AVX512 static INLINE void plane(const uint8_t *codes, int rows, int columns, const int8_t *x, int vectors, int above,
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
INLINE void add(const Digits &x, int group, const int32_t *sums, const float *step,
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
INLINE void rows_of_strip(const Matrix &m, const Digits &x, int strip, int row, int fraction,
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
INLINE void strip_of(const Matrix &m, const Digits &x, int strip, float *to) {
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

// --- what stands between the products of a block -------------------------------------------------------------------
// Sums are of LANES partial ones, added up in the same order whatever the instruction set.

constexpr int LANES = 16;

template <class T>
INLINE T total(const T (&lane)[LANES]) {
    T sum[LANES];
    for (int l = 0; l < LANES; l++) sum[l] = lane[l];
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++) sum[l] = sum[l] + sum[l + half];
    return sum[0];
}

// Within 2 units in the last place for x in -87..88; beyond, as at these ends.
INLINE float exp_of(float x) {
    constexpr float WHOLE = 0x1.8p23f;
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + WHOLE, power = shifted - WHOLE;
    const float r = (x - power * 0.693359375f) - power * -2.12194440e-4f;  // ln 2 in two parts
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const uint32_t exponent = bits_of<uint32_t>(shifted) - bits_of<uint32_t>(WHOLE) + 127u;
    return y * bits_of<float>(exponent << 23);
}

INLINE void norm_of(const Norm &norm, const float *x, int count, float *y) {
    double sums[LANES] = {}, squares[LANES] = {};
    const int even = count / LANES * LANES;
    for (int i = 0; i < even; i += LANES)
        for (int l = 0; l < LANES; l++) sums[l] += static_cast<double>(x[i + l]);
    for (int i = even; i < count; i++) sums[i - even] += static_cast<double>(x[i]);
    const double mean = total(sums) / count;
    for (int i = 0; i < even; i += LANES)
        for (int l = 0; l < LANES; l++) {
            const double away = static_cast<double>(x[i + l]) - mean;
            squares[l] += away * away;
        }
    for (int i = even; i < count; i++) {
        const double away = static_cast<double>(x[i]) - mean;
        squares[i - even] += away * away;
    }
    const float middle = static_cast<float>(mean);
    const float scale = static_cast<float>(1.0 / std::sqrt(total(squares) / count + static_cast<double>(norm.epsilon)));
    for (int i = 0; i < count; i++) y[i] = (x[i] - middle) * scale * norm.weight[i] + norm.bias[i];
}

// x / (1 + e^-2u) is x (1 + tanh u) / 2.
INLINE void gelu_of(float *x, int count, bool exact) {
    if (exact) {
        for (int i = 0; i < count; i++) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.707106781f));
        return;
    }
    for (int i = 0; i < count; i++) {
        const float u = 0.797884561f * (x[i] + 0.044715f * (x[i] * x[i] * x[i]));
        x[i] = x[i] / (1.0f + exp_of(-2.0f * u));
    }
}

// out += weights V for WIDE columns of V, whose rows lie `dim` apart.
template <int WIDE>
INLINE void weigh(const float *weights, const float *values, int count, int dim, float over, float *out) {
    float sum[WIDE] = {};
    for (int t = 0; t < count; t++)
        for (int i = 0; i < WIDE; i++) sum[i] += weights[t] * values[static_cast<int64_t>(t) * dim + i];
    for (int i = 0; i < WIDE; i++) out[i] = sum[i] * over;
}

// One head, one token: out = softmax(scale q K^T) V over `count` rows of K and V. `scores` has room for count, rounded
// up to whole LANES.
INLINE void attend_to(const float *q, const float *keys, const float *values, int count, int dim, float scale,
                      float *scores, float *out) {
    const int even = dim / LANES * LANES, padded = (count + LANES - 1) / LANES * LANES;
    for (int t = 0; t < count; t++) {
        const float *k = keys + static_cast<int64_t>(t) * dim;
        float lane[LANES] = {};
        for (int i = 0; i < even; i += LANES)
            for (int l = 0; l < LANES; l++) lane[l] += q[i + l] * k[i + l];
        for (int i = even; i < dim; i++) lane[i - even] += q[i] * k[i];
        scores[t] = total(lane) * scale;
    }
    float tops[LANES], sums[LANES] = {};
    std::fill(tops, tops + LANES, -INFINITY);
    std::fill(scores + count, scores + padded, -INFINITY);
    for (int t = 0; t < padded; t += LANES)
        for (int l = 0; l < LANES; l++) tops[l] = scores[t + l] > tops[l] ? scores[t + l] : tops[l];
    float top = tops[0];
    for (float other : tops) top = other > top ? other : top;
    for (int t = 0; t < padded; t++) scores[t] = exp_of(scores[t] - top);
    std::fill(scores + count, scores + padded, 0.0f);
    for (int t = 0; t < padded; t += LANES)
        for (int l = 0; l < LANES; l++) sums[l] += scores[t + l];
    const float over = 1.0f / total(sums);
    int i = 0;
    for (; i + 4 * LANES <= dim; i += 4 * LANES) weigh<4 * LANES>(scores, values + i, count, dim, over, out + i);
    for (; i + LANES <= dim; i += LANES) weigh<LANES>(scores, values + i, count, dim, over, out + i);
    for (; i < dim; i++) weigh<1>(scores, values + i, count, dim, over, out + i);
}

// --- one set of functions for each instruction set -----------------------------------------------------------------

struct Kernels {
    void (*fill)(const Matrix &, const float *, int, const Digits &);
    void (*strip)(const Matrix &, const Digits &, int, float *);
    void (*norm)(const Norm &, const float *, int, float *);
    void (*gelu)(float *, int, bool);
    void (*attend)(const float *, const float *, const float *, int, int, float, float *, float *);
};

#define KERNELS(NAME, TARGET, KIND)                                                                                        \
    namespace NAME##_kernels {                                                                                             \
    TARGET void fill(const Matrix &m, const float *x, int t, const Digits &to) { fill_group(m, x, t, to); }            \
    TARGET void strip(const Matrix &m, const Digits &x, int s, float *y) { strip_of<KIND>(m, x, s, y); }               \
    TARGET void norm(const Norm &n, const float *x, int count, float *y) { norm_of(n, x, count, y); }                  \
    TARGET void gelu(float *x, int count, bool exact) { gelu_of(x, count, exact); }                                    \
    TARGET void attend(const float *q, const float *k, const float *v, int count, int dim, float scale, float *scores, \
                       float *out) {                                                                                   \
        attend_to(q, k, v, count, dim, scale, scores, out);                                                            \
    }                                                                                                                  \
    }                                                                                                                  \
    constexpr Kernels NAME = {NAME##_kernels::fill, NAME##_kernels::strip, NAME##_kernels::norm, NAME##_kernels::gelu, NAME##_kernels::attend}

KERNELS(portable, , Portable);
#ifdef X86
KERNELS(avx2, AVX2, Avx2);
KERNELS(avx512, AVX512, Avx512);
#endif

// 0 portable, 1 AVX2, 2 AVX-512 VNNI: the set asked for, or the next smaller one that the processor has and whose
// vectors a tile's rows fill.
int found_set(int set, int rows) {
#ifdef X86
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (set >= 2 && rows % Avx512::LANES == 0 && wide) return 2;
    if (set >= 1 && rows % Avx2::LANES == 0 && __builtin_cpu_supports("avx2")) return 1;
#endif
    (void)set, (void)rows;
    return 0;
}

const Kernels &choose(int set, int rows) {
#ifdef X86
    const int found = found_set(set, rows);
    if (found == 2) return avx512;
    if (found == 1) return avx2;
#endif
    (void)set, (void)rows;
    return portable;
}

struct How {  // products are made
    int digits, threads, set;
};

// y = W x; then(first, count) follows when these rows of y are there.
template <class Then>
void multiply(const Matrix &m, const float *x, int batch, const How &how, float *y, const Then &then) {
    static const bool ready = [] {
        for (int i = 0; i < 256 + 7 + 16; i++) STEPS[i] = static_cast<float>(std::exp2((i - OFFSET - 1) / 8.0));
        return true;
    }();
    (void)ready;
    if (how.threads > 1) pool().call_up();
    const int groups = (m.in + m.columns - 1) / m.columns, vectors = batch * how.digits;
    std::vector<int8_t> values(static_cast<size_t>(groups) * m.columns * vectors);
    std::vector<int32_t> sums(static_cast<size_t>(groups) * vectors);
    std::vector<float> steps(static_cast<size_t>(groups) * batch);
    const Digits found{batch, how.digits, vectors, groups, values.data(), sums.data(), steps.data()};
    const Kernels &own = choose(how.set, m.rows);
    pool().run(groups, groups * batch < 32 ? 1 : how.threads, [&](int t) { own.fill(m, x, t, found); });
    const int strips = (m.out + m.rows - 1) / m.rows;
    const int together = std::max(1, strips / (16 * how.threads));  // neighbours in the file, for the prefetcher
    pool().run((strips + together - 1) / together, how.threads, [&](int i) {
        const int first = i * together, last = std::min(strips, first + together);
        for (int s = first; s < last; s++) own.strip(m, found, s, y);
        then(first * m.rows, std::min(m.out, last * m.rows) - first * m.rows);
    });
}

// One row of W in the order of its columns, as `tiles` decodes it. steps[i]: that of eighth base + i.
void decode_row(const Matrix &m, int64_t number, const float *steps, float *y) {
    const int64_t strip = number / m.rows, row = number % m.rows;
    const uint8_t *codes = m.codes + m.code_starts[strip];
    int64_t tile = m.tile_starts[strip];
    std::fill(y, y + m.in, 0.0f);
    for (int i = 1; i < 8; i++) {
        const int bits = WIDTHS[i];
        for (int n = 0; n < m.counts[strip * 8 + i]; n++, tile++) {
            const int nibble = m.nibbles[tile * ((m.rows + 1) / 2) + row / 2] >> (row % 2 * 4) & 15, eighth = m.bytes[tile] + nibble;
            const float middle = 0.5f * static_cast<float>((1 << bits) - (eighth % 2 ? 0 : 1));
            const float step = nibble ? steps[eighth - 1] : 0.0f;
            uint8_t code[LARGEST_SIDE] = {};
            int above = 0;
            for (int p : PLANES) {
                if (!(bits & p)) continue;
                const int size = m.columns * p / 8, mask = (1 << p) - 1;
                for (int k = 0; k < size; k++) {
                    const int byte = codes[(k / 4 * m.rows + row) * 4 + k % 4];
                    for (int e = 0; e < 8 / p; e++) code[k + size * e] |= static_cast<uint8_t>((byte >> (p * e) & mask) << above);
                }
                codes += static_cast<int64_t>(m.rows) * size;
                above += p;
            }
            const int first = m.groups[tile] * m.columns, count = std::min(m.columns, m.in - first);
            for (int c = 0; c < count; c++) y[m.order[first + c]] = (static_cast<float>(code[c]) - middle) * step;
        }
    }
}

void plus(const float *other, int count, float *y) {
    if (!other) return;
    for (int i = 0; i < count; i++) y[i] = y[i] + other[i];
}

// What a block does with one token behind others, y += all that it adds to y.
void write_token(const Block &b, const Past &past, int tokens, const How &how, float *y) {
    const int width = b.width, dim = width / b.heads, inner = b.up->out, count = tokens + 1;
    const int padded = (count + LANES - 1) / LANES * LANES;
    const Kernels &own = choose(how.set, LANES);
    std::vector<float> normed(width), asked(3 * static_cast<size_t>(width)), found(width), wide(inner);
    std::vector<float> scores(static_cast<size_t>(b.heads) * padded);
    const auto at = [](const float *bias, int first) { return bias ? bias + first : nullptr; };

    own.norm(b.norms[0], y, width, normed.data());
    multiply(*b.qkv, normed.data(), 1, how, asked.data(), [&](int first, int rows) {
        plus(at(b.qkv_bias, first), rows, asked.data() + first);
    });
    pool().run(b.heads, how.threads, [&](int h) {
        const float *q = asked.data() + h * dim;
        float *keys = past.keys + h * past.room * dim, *values = past.values + h * past.room * dim;
        std::copy_n(q + width, dim, keys + static_cast<int64_t>(tokens) * dim);
        std::copy_n(q + 2 * width, dim, values + static_cast<int64_t>(tokens) * dim);
        float *room = scores.data() + static_cast<int64_t>(h) * padded;
        own.attend(q, keys, values, count, dim, b.scale, room, found.data() + h * dim);
    });
    multiply(*b.out, found.data(), 1, how, normed.data(), [&](int first, int rows) {
        plus(at(b.out_bias, first), rows, normed.data() + first);
        plus(normed.data() + first, rows, y + first);
    });
    own.norm(b.norms[1], y, width, normed.data());
    multiply(*b.up, normed.data(), 1, how, wide.data(), [&](int first, int rows) {
        plus(at(b.up_bias, first), rows, wide.data() + first);
        own.gelu(wide.data() + first, rows, b.exact);
    });
    multiply(*b.down, wide.data(), 1, how, found.data(), [&](int first, int rows) {
        plus(at(b.down_bias, first), rows, found.data() + first);
        plus(found.data() + first, rows, y + first);
    });
}

}  // namespace

extern "C" {

const char *nashswarm_source() { return NASHSWARM_SOURCE; }

// What `nashswarm_multiply` runs for tiles of this many rows, as numbered in `found_set`.
int nashswarm_set(int set, int rows) { return found_set(set, rows); }

// x float32 [batch][in] -> y float32 [batch][out]. digits 1 or 3, batch 1 to 8. Returns 0, or 1 for want of memory.
int nashswarm_multiply(const Matrix *m, const float *x, int batch, int digits, int threads, int set, float *y) {
    try {
        multiply(*m, x, batch, {digits, threads, set}, y, [](int, int) {});
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    }
}

// y float32 [count][in], rows of W by their numbers, which are below out. steps: 2^((base + i) / 8) for i in 0..269.
void nashswarm_rows(const Matrix *m, const int64_t *numbers, int64_t count, const float *steps, float *y) {
    for (int64_t i = 0; i < count; i++) decode_row(*m, numbers[i], steps, y + i * m->in);
}

// y float32 [width], a token, through blocks that follow each other. Of each block's past so many `tokens` are there, and
// the token's keys and values become the next: tokens is below all rooms. Returns 0, or 1 for want of memory.
int nashswarm_write(const Block *blocks, const Past *pasts, int count, int tokens, int digits, int threads, int set, float *y) {
    try {
        for (int i = 0; i < count; i++) write_token(blocks[i], pasts[i], tokens, {digits, threads, set}, y);
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    }
}
}
