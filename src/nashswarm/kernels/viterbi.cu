// The path of least error down every column of a block of rows, as `trellis` finds it where rows do not interact: a
// thread a column. Float32, in the order of `trellis._round` and without contraction, so that codes are the same.
//
// Before this text come STATES; WAYS, the first ways into all states, then the second (parity * STATES + the state
// before); QUANTIZERS, of all states; BEYOND, the first code that is no symbol; LARGEST; OUT_OF_BOUNDS.

#if STATES > 32
typedef unsigned long long Bits;
#else
typedef unsigned int Bits;
#endif

__constant__ unsigned char WAY[2 * STATES] = {WAYS};
__constant__ unsigned char QUANTIZER[STATES] = {QUANTIZERS};

// The same at compile time, so that costs stay in registers.
__device__ constexpr int way_into(int number, int state) {
  const unsigned char all[2 * STATES] = {WAYS};
  return all[number * STATES + state];
}
__device__ constexpr int quantizer_of(int state) {
  const unsigned char all[STATES] = {QUANTIZERS};
  return all[state];
}

// The nearest code on one of the two grids and the second nearest, of |x|. `neither`: both are beyond the symbols.
struct Grid {
  float near, other, near_cost, other_cost;
  bool odd, neither;
};

__device__ __forceinline__ Grid look(float scaled, int quantizer) {
  const float shift = quantizer ? 0.5f : 0.0f;
  Grid g;
  g.near = rintf(scaled + shift);
  g.other = scaled + shift > g.near ? g.near + 1.0f : g.near - 1.0f;
  if (shift > 0.0f && g.near == 1.0f && scaled < 0.75f) g.other = 0.0f;
  const float near_size = g.near > 0.0f ? g.near - shift : g.near;
  const float other_size = g.other > 0.0f ? g.other - shift : g.other;
  g.near_cost = (scaled - near_size) * (scaled - near_size);
  g.other_cost = (scaled - other_size) * (scaled - other_size);
  const float symbol = g.near < BEYOND ? g.near : float(BEYOND);
  g.odd = symbol - 2.0f * floorf(symbol * 0.5f) > 0.0f;
  g.neither = g.near >= BEYOND && g.other >= BEYOND;
  return g;
}

// What the paths of one row cost: by quantizer, with a code of even parity, and of odd. Where neither code is a symbol
// (`RARE`) both are odd, and which is cheaper may depend on how the sum with the path's cost is rounded.
struct Row {
  float even[2], odd[2], second[2];
  bool neither[2];
};

template <int S, bool RARE>
__device__ __forceinline__ float along(const float (&cost)[STATES], const Row& row) {
  constexpr int before = S % STATES, parity = S / STATES, q = quantizer_of(before);
  float sum = cost[before] + (parity ? row.odd[q] : row.even[q]);
  if (RARE && parity && row.neither[q]) {
    const float other = cost[before] + row.second[q];
    if (other < sum) sum = other;
  }
  return sum;
}

template <int S, bool RARE>
__device__ __forceinline__ void enter(
    const float (&cost)[STATES], float (&next)[STATES], const Row& row, Bits& decided, Bits& swapped) {
  if constexpr (S < STATES) {
    const float one = along<way_into(0, S), RARE>(cost, row);
    const float other = along<way_into(1, S), RARE>(cost, row);
    next[S] = other < one ? other : one;
    if (other < one) decided |= Bits(1) << S;
    constexpr int q = quantizer_of(S);
    if (RARE && row.neither[q] && cost[S] + row.second[q] < cost[S] + row.odd[q]) swapped |= Bits(1) << S;
    enter<S + 1, RARE>(cost, next, row, decided, swapped);
  }
}

// Sequence t begins at begins[t] of `latents`, goes on in strides of strides[t], and has rows[t] rows. `decided` and
// `swapped` are scratch of the size of `latents`; `codes` may be null.
extern "C" __global__ void __launch_bounds__(64) round_columns(
    const float* __restrict__ latents, Bits* __restrict__ decided, Bits* __restrict__ swapped,
    float* __restrict__ values, int* __restrict__ codes, const long long* __restrict__ begins,
    const int* __restrict__ strides, const int* __restrict__ rows, int count) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= count) return;
  const long long begin = begins[t], stride = strides[t];
  const float infinite = __int_as_float(0x7f800000);
  float cost[STATES], next[STATES];
#pragma unroll
  for (int s = 0; s < STATES; s++) cost[s] = s ? infinite : 0.0f;
  for (int r = 0; r < rows[t]; r++) {
    const long long place = begin + r * stride;
    const float scaled = fabsf(latents[place]);
    Row row;
#pragma unroll
    for (int q = 0; q < 2; q++) {
      const Grid g = look(scaled, q);
      row.even[q] = g.neither ? infinite : (g.odd ? g.other_cost : g.near_cost);
      row.odd[q] = g.odd ? g.near_cost : g.other_cost;
      row.second[q] = g.other_cost;
      row.neither[q] = g.neither;
    }
    Bits ways = 0, swaps = 0;
    if (row.neither[0] || row.neither[1]) {
      enter<0, true>(cost, next, row, ways, swaps);
      swapped[place] = swaps;
    } else {
      enter<0, false>(cost, next, row, ways, swaps);
    }
#pragma unroll
    for (int s = 0; s < STATES; s++) cost[s] = next[s];
    decided[place] = ways;
  }
  int best = 0;
  float least = cost[0];
#pragma unroll
  for (int s = 1; s < STATES; s++)
    if (cost[s] < least) {
      least = cost[s];
      best = s;
    }
  for (int r = rows[t] - 1; r >= 0; r--) {
    const long long place = begin + r * stride;
    const int way = WAY[int(decided[place] >> best & 1) * STATES + best];
    best = way % STATES;
    const int quantizer = QUANTIZER[best];
    const float latent = latents[place];
    const Grid g = look(fabsf(latent), quantizer);
    const bool swap = !g.odd || (g.neither && (swapped[place] >> best & 1));
    const float size = way / STATES ? (swap ? g.other : g.near) : (g.odd ? g.other : g.near);
    const float code = latent >= 0.0f ? size : -size;
    const float shift = code == 0.0f || !quantizer ? 0.0f : (code > 0.0f ? 0.5f : -0.5f);
    values[place] = code - shift;
    if (codes) codes[place] = fabsf(code) < LARGEST ? int(code) : OUT_OF_BOUNDS;
  }
}
