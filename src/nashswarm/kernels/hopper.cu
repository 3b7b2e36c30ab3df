// Products with up to 16 rows of activations by the packed bits of `tiles` (16 x 128), for compute capability 9.0.
//
// A block of 4 warps has 4 strips and a run of groups of columns (an item); a warp has one strip of them. Its codes lie
// in one piece and come by one or two bulk copies into shared memory, asked for before the activations are there: the
// launch is programmatic, so that a block waits for those with its codes already on their way.
//
// Activations are integers of 24 bits with a unit for each group, cut into 3 signed digits of 8 bits, and products are
// those of int8 tensor cores: exact sums. A tile's codes are unsigned bytes; a step's middle comes in by the sums of
// digits. Codes lie in the order of the tensor cores' fragments (hopper.py), so that a lane loads 16 bytes that it uses
// itself. The digits of all rows are columns of one product: up to 2 rows, of a warp's own (`small`); above, of 4 warps
// at once (wgmma), which reads activations where they lie in shared memory (`large`). Their records are large there: a
// block has 2 items of the same groups, and records go through a ring.
//
// Blocks leave their sums in `partial`; the last one of 4 strips to arrive adds them up in their order: results are the
// same from run to run. No header is needed.
typedef unsigned int u32;
typedef unsigned char u8;
typedef unsigned short u16;
#define DEV static __device__ __forceinline__

DEV u32 sm(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// --- barriers that count bytes, copies, tensor cores ---------------------------------------------------------------

DEV void bar_init(u32 b, u32 arrivals = 1) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(arrivals));
}
// After all of a thread's, before copies that they count.
DEV void bar_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
DEV void bar_arrive(u32 b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b) : "memory"); }
DEV void bar_expect(u32 b, u32 n) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(n) : "memory");
}
DEV void bulk(u32 d, const void* s, u32 n, u32 b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(d),
               "l"(s), "r"(n), "r"(b)
               : "memory");
}
DEV void bar_wait(u32 b, u32 parity = 0) {
  asm volatile("{ .reg .pred p; L: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra L; }" ::"r"(b),
               "r"(parity)
               : "memory");
}
// Among the W warps of an item, the block's `mine`th.
DEV void item_sync(int mine) { asm volatile("bar.sync %0, 128;" ::"r"(mine + 1) : "memory"); }
// Until the kernels before have ended and their memory is there; and: the next kernel may start.
DEV void gdc_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEV void gdc_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// c += a b for a of 16 x 32 unsigned and b of 32 x 8 signed bytes.
DEV void mma(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// As `mma`, for the 4 warps of an item, each with its own a, and b of 32 x 24 BT in shared memory: 8 x 16 bytes of
// transposed b lie together; next to them the same k of the next 8 columns, after all of these the next 16 k. c is what
// it was, or 0, and may be read, as a be written, after `wgmma_wait`.
DEV void wgmma(int (&c)[12], const u32* a, unsigned long long b, int add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %17, 0;"
      "wgmma.mma_async.sync.aligned.m64n24k32.s32.u8.s8 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11},"
      "{%12,%13,%14,%15},%16,p; }"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]), "+r"(c[4]), "+r"(c[5]), "+r"(c[6]), "+r"(c[7]), "+r"(c[8]),
        "+r"(c[9]), "+r"(c[10]), "+r"(c[11])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
DEV void wgmma(int (&c)[24], const u32* a, unsigned long long b, int add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %29, 0;"
      "wgmma.mma_async.sync.aligned.m64n48k32.s32.u8.s8 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,"
      "%18,%19,%20,%21,%22,%23},{%24,%25,%26,%27},%28,p; }"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]), "+r"(c[4]), "+r"(c[5]), "+r"(c[6]), "+r"(c[7]), "+r"(c[8]),
        "+r"(c[9]), "+r"(c[10]), "+r"(c[11]), "+r"(c[12]), "+r"(c[13]), "+r"(c[14]), "+r"(c[15]), "+r"(c[16]),
        "+r"(c[17]), "+r"(c[18]), "+r"(c[19]), "+r"(c[20]), "+r"(c[21]), "+r"(c[22]), "+r"(c[23])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
template <int N>
DEV void wgmma_wait(int (&c)[N]) {
  asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(c[i]));  // no use before
}
DEV float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// --- what kernels are given ----------------------------------------------------------------------------------------

enum { HALF, BFLOAT, FLOAT };  // kinds of activations and results

struct Args {
  const u8* codes;    // of slots (an item's warps) one after another, a slot's tiles by group, in units of 256 bytes
  const uint4* meta;  // [slots][deep]: 16 nibbles of rows, then byte | width << 8 | the slot's units before << 16
  const int4* table;  // [slots]: first unit; units; those of the first half of groups; the item's units before
  const int* order;   // of columns
  int* arrived;       // [strips]: items that have ended
  const void* x;      // [batch][nin]
  void* y;            // [batch][out]
  u8* rec;            // [groups] records of activations
  float* partial;     // [items][4][rows of activations][16]
  // strips: by fours; splits: items for one of these; deep: most groups of an item; most: units of an item
  int base, out, nin, batch, groups, strips, splits, deep, most, kind;
};

DEV float load(const void* x, size_t i, int kind) {
  if (kind == FLOAT) return ((const float*)x)[i];
  const u16 v = ((const u16*)x)[i];
  if (kind == BFLOAT) return __uint_as_float((u32)v << 16);
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
}

DEV void store(void* y, size_t i, float f, int kind) {
  u16 v;
  if (kind == FLOAT) {
    ((float*)y)[i] = f;
    return;
  }
  if (kind == BFLOAT) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
  else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
  ((u16*)y)[i] = v;
}

// --- activations ---------------------------------------------------------------------------------------------------

// A group's record, up to 2 rows (BP of them): digits [half][column][t][16 bytes] with column = digit * BP + row, as
// the lanes of a product load them; their sums, int [3][2]; units float [2]. More rows (BT times 8): digits
// [8][3][8 BT rows][16 of the group's columns], as `wgmma` reads them; behind all records, of a group's rows, the unit
// and the sum of x, float [groups][8 BT][2].
constexpr int D = 3;
__device__ constexpr int rec_small(int bp) { return D * bp * 128 + 48; }
__device__ constexpr int rec_large(int bt) { return D * bt * 1024; }

// A warp has a row of a group. blocks (32, rows of a block), grid (groups, rows / those).
template <int BP, int BT>
DEV void prepare(const Args& a) {
  gdc_launch();
  const int g = blockIdx.x, b = blockIdx.y * blockDim.y + threadIdx.y, lane = threadIdx.x, place = g * 128 + lane * 4;
  int col[4];
#pragma unroll
  for (int j = 0; j < 4; j++) col[j] = place + j < a.nin ? __ldg(a.order + place + j) : -1;
  gdc_wait();
  if (b == 0)
    for (int i = g * 32 + lane; i < a.strips; i += gridDim.x * 32) a.arrived[i] = 0;
  float v[4];
#pragma unroll
  for (int j = 0; j < 4; j++) v[j] = b < a.batch && col[j] >= 0 ? load(a.x, (size_t)b * a.nin + col[j], a.kind) : 0.f;
  u32 m = 0;  // the largest; inf and nan are above all else
#pragma unroll
  for (int j = 0; j < 4; j++) m = max(m, __float_as_uint(fabsf(v[j])));
  m = __reduce_max_sync(~0u, m);
  constexpr int REC = BP ? rec_small(BP) : rec_large(BT), TOPBIT = 22;
  u8* r = a.rec + (size_t)g * REC;
  const int hf = lane >> 4, word = ((lane >> 3) & 1) * 2 + ((lane >> 2) & 1), t = lane & 3;
  const int e = (int)(m >> 23) - 126;  // |x| < 2^e
  const bool live = m >= (37u << 23), fin = m < 0x7f800000u;  // 2^-90
  const float scale = live && fin ? __uint_as_float((u32)(127 + TOPBIT - e) << 23) : 0.f;
  const float unit = !fin ? __uint_as_float(0x7fc00000u) : live ? __uint_as_float((u32)(127 + e - TOPBIT) << 23) : 0.f;
  int q[4], total = 0;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    q[j] = fin ? __float2int_rn(v[j] * scale) : 0;
    total += q[j];
  }
  total = __reduce_add_sync(~0u, total);
#pragma unroll
  for (int d = D - 1; d >= 0; d--) {
    u32 w = 0;
    int sum = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int dig = d ? (int)(signed char)(q[j] & 255) : q[j];
      w |= (u32)(dig & 255) << (8 * j);
      q[j] = (q[j] - dig) >> 8;
      sum += dig;
    }
    if (BP) {
      *(u32*)(r + hf * (3 * BP * 64) + ((d * BP + b) * 4 + t) * 16 + word * 4) = w;
      sum = __reduce_add_sync(~0u, sum);
      if (lane == 0) ((int*)(r + 3 * BP * 128))[d * 2 + b] = sum;
    } else
      *(u32*)(r + (((lane >> 2) * D + d) * 8 * BT + b) * 16 + t * 4) = w;
  }
  if (lane == 0) {
    if (BP) ((float*)(r + 3 * BP * 128 + 32))[b] = unit;
    else ((float2*)(a.rec + (size_t)a.groups * REC))[g * 8 * BT + b] = make_float2(unit, (float)total * unit);
  }
}

// --- after a product -----------------------------------------------------------------------------------------------

constexpr int W = 4;  // warps and strips of an item
constexpr int F = 2;  // items of a block of `large`
constexpr int S = 3;  // records of its ring

// The last item of 4 strips to end adds up, by its W warps. NV: rows of activations in `partial`; `mine`: the item's
// place in its block. One thread's atomic orders all that these warps wrote: 1 us faster than a fence by each thread.
template <int NV>
DEV void finish(const Args& a, int sg, int tid, int mine) {
  __shared__ int last[F];
  item_sync(mine);
  if (tid == 0) {
    int ended;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(ended) : "l"(a.arrived + sg) : "memory");
    last[mine] = ended == a.splits - 1;
  }
  item_sync(mine);
  if (!last[mine]) return;
  // A thread's sums, by fours, and how many items it asks for at once.
  constexpr int SIZE = W * 4 * NV, OWN = (SIZE + W * 32 - 1) / (W * 32), AHEAD = OWN > 1 ? 8 : 12;
  const float4* p = (const float4*)a.partial + (size_t)sg * a.splits * SIZE + tid;
  float4 sum[OWN] = {};
  for (int k = 0; k < a.splits; k += AHEAD) {
    float4 v[AHEAD][OWN];
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
#pragma unroll
      for (int o = 0; o < OWN; o++)
        v[j][o] = k + j < a.splits && tid + o * W * 32 < SIZE ? __ldcg(p + (size_t)(k + j) * SIZE + o * W * 32)
                                                              : make_float4(0, 0, 0, 0);
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
#pragma unroll
      for (int o = 0; o < OWN; o++)
        sum[o].x += v[j][o].x, sum[o].y += v[j][o].y, sum[o].z += v[j][o].z, sum[o].w += v[j][o].w;
  }
#pragma unroll
  for (int o = 0; o < OWN; o++) {
    const int i = tid + o * W * 32, w = i / (4 * NV), b = i / 4 % NV, row = (sg * W + w) * 16 + i % 4 * 4;
    const float f[4] = {sum[o].x, sum[o].y, sum[o].z, sum[o].w};
    if (i < SIZE && b < a.batch)
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (row + j < a.out) store(a.y, (size_t)b * a.out + row + j, f[j], a.kind);
  }
}

// --- products ------------------------------------------------------------------------------------------------------

// Of rows g and g + 8: the step, and minus twice the middle of the grid, which has zero in it or lies around it.
DEV void steps(uint4 m, int g, int base, float& s0, float& s1, int& m0, int& m1, u32 width) {
  int n0 = (m.x >> (4 * g)) & 15, n1 = (m.y >> (4 * g)) & 15, byte = m.z & 255;
  int e0 = n0 + byte, e1 = n1 + byte;
  s0 = n0 ? ex2((float)(e0 + base - 1) * 0.125f) : 0.f;
  s1 = n1 ? ex2((float)(e1 + base - 1) * 0.125f) : 0.f;
  int mid = (1 << width) - 1;
  m0 = -(mid + (e0 & 1));
  m1 = -(mid + (e1 & 1));
}

extern __shared__ __align__(128) u8 s[];

// Shared memory: barriers (activations; 2 of each warp), steps, labels, records, codes.
template <int BP>
DEV void small(const Args& a) {
  constexpr int REC = rec_small(BP);
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
  const int sg = blockIdx.x / a.splits, ks = blockIdx.x % a.splits;
  const int g0 = ks * a.groups / a.splits, n = (ks + 1) * a.groups / a.splits - g0;
  const u32 loff = 256 + W * a.deep * 64, xoff = (loff + W * a.deep * 4 + 15) & ~15u;
  const u32 coff = (xoff + a.deep * REC + 127) & ~127u;
  const int at = blockIdx.x * W + warp;
  const int4 e = __ldg(a.table + at);
  const int units = e.y, early = e.z, mid = n / 2;  // what is asked for before the activations are there
  const u32 bar = sm(s) + 8 + warp * 8, bar2 = bar + W * 8;
  if (lane == 0) {
    bar_init(bar);
    bar_init(bar2);
    if (warp == 0) bar_init(sm(s));
    bar_init_done();
    bar_expect(bar, early * 256);
    if (early) bulk(sm(s) + coff + e.w * 256, a.codes + (size_t)e.x * 256, early * 256, bar);
  }
  gdc_launch();
  // steps, negative where the grid has zero in it; labels; where this warp's activations lie
  float2* const st = (float2*)(s + 256) + warp * a.deep * 8 + g;
  u32* const labels = (u32*)(s + loff) + warp * a.deep;
  for (int j = t; j < n; j += 4) {
    const uint4 m = __ldg(a.meta + (size_t)at * a.deep + j);
    const int n0 = (m.x >> (4 * g)) & 15, n1 = (m.y >> (4 * g)) & 15, byte = m.z & 255;
    const float s0 = n0 ? ex2((float)(n0 + byte + a.base - 1) * 0.125f) : 0.f;
    const float s1 = n1 ? ex2((float)(n1 + byte + a.base - 1) * 0.125f) : 0.f;
    st[j * 8] = make_float2(n0 + byte & 1 ? -s0 : s0, n1 + byte & 1 ? -s1 : s1);
    if (g == 0) labels[j] = m.z >> 8;
  }
  gdc_wait();
  if (tid == 0) {
    bar_expect(sm(s), n * REC);
    bulk(sm(s) + xoff, a.rec + (size_t)g0 * REC, n * REC, sm(s));
  }
  if (lane == 0) {
    bar_expect(bar2, (units - early) * 256);
    const u32 to = sm(s) + coff + (e.w + early) * 256;
    if (units - early) bulk(to, a.codes + ((size_t)e.x + early) * 256, (units - early) * 256, bar2);
  }
  __syncthreads();
  bar_wait(sm(s));
  const u8* codes = s + coff + e.w * 256;
  const int col = min(g >> 1, 2) * BP + (BP == 2 ? g & 1 : 0);
  const u8* xr = s + xoff + (col * 4 + t) * 16;
  const u8* xs = s + xoff + 3 * BP * 128;
  bar_wait(bar);
  float acc[2][BP] = {};
#pragma unroll 2
  for (int j = 0; j < n; j++) {
    if (j == mid) bar_wait(bar2);
    const u32 label = labels[j], width = label & 15;
    if (!width) continue;
    const u8* p = codes + (label >> 8) * 256 + lane * 16;
    uint4 xa = *(const uint4*)(xr + j * REC), xb = *(const uint4*)(xr + j * REC + 3 * BP * 64);
    const u32 b0[4] = {xa.x, xa.z, xb.x, xb.z}, b1[4] = {xa.y, xa.w, xb.y, xb.w};
    int tot[4] = {};  // 16 times the sum
    if (width & 8) {
      int c[4] = {}, d[4] = {};
#pragma unroll
      for (int q = 0; q < 4; q++) {
        uint4 w = *(const uint4*)(p + q * 512);
        if (q & 1) mma(d, w.x, w.y, w.z, w.w, b0[q], b1[q]); else mma(c, w.x, w.y, w.z, w.w, b0[q], b1[q]);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) tot[i] = (c[i] + d[i]) << 4;
    }
    if (width & 4) {
      int lo[4] = {}, hi[4] = {};
#pragma unroll
      for (int q = 0; q < 2; q++) {
        uint4 w = *(const uint4*)(p + q * 512);
        const u32 L = 0x0f0f0f0fu, H = 0xf0f0f0f0u;
        mma(lo, w.x & L, w.y & L, w.z & L, w.w & L, b0[q], b1[q]);
        mma(hi, w.x & H, w.y & H, w.z & H, w.w & H, b0[q + 2], b1[q + 2]);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) tot[i] = (lo[i] << 4) + hi[i];
    }
    if (width & 2) {
      int lo[4] = {}, hi[4] = {};
      uint4 w = *(const uint4*)(p + (width & 4) * 256);
      const u32 L = 0x03030303u, H = 0x0c0c0c0cu;
      mma(lo, w.x & L, w.y & L, w.z & L, w.w & L, b0[0], b1[0]);
      mma(hi, w.x & H, w.y & H, w.z & H, w.w & H, b0[1], b1[1]);
      w.x >>= 4, w.y >>= 4, w.z >>= 4, w.w >>= 4;
      mma(lo, w.x & L, w.y & L, w.z & L, w.w & L, b0[2], b1[2]);
      mma(hi, w.x & H, w.y & H, w.z & H, w.w & H, b0[3], b1[3]);
      const int f = width & 4 ? 64 : 4;
#pragma unroll
      for (int i = 0; i < 4; i++) tot[i] += ((lo[i] << 2) + hi[i]) * f;
    }
    if (width & 1) {
      int lo[4] = {}, hi[4] = {};
      uint2 v = *(const uint2*)(p + (width & 6) * 256 - lane * 8);
      uint4 w = make_uint4(v.x, v.y, v.x >> 1, v.y >> 1);
      const u32 L = 0x01010101u, H = 0x04040404u;
      mma(lo, w.x & L, w.y & L, w.z & L, w.w & L, b0[0], b1[0]);
      mma(hi, w.x & H, w.y & H, w.z & H, w.w & H, b0[1], b1[1]);
      w.x >>= 4, w.y >>= 4, w.z >>= 4, w.w >>= 4;
      mma(lo, w.x & L, w.y & L, w.z & L, w.w & L, b0[2], b1[2]);
      mma(hi, w.x & H, w.y & H, w.z & H, w.w & H, b0[3], b1[3]);
      const int f = 4 << (width & 6);
#pragma unroll
      for (int i = 0; i < 4; i++) tot[i] += ((lo[i] << 2) + hi[i]) * f;
    }
    const float2 ss = st[j * 8];
    const float s0 = fabsf(ss.x), s1 = fabsf(ss.y);
    const int mid = 1 - (1 << width);
    const int m0 = mid + ((int)__float_as_uint(ss.x) >> 31), m1 = mid + ((int)__float_as_uint(ss.y) >> 31);
    const int2 sd = *(const int2*)(xs + j * REC + t * 8);
    const float2 un = *(const float2*)(xs + j * REC + 32);
    acc[0][0] += (float)(tot[0] + 8 * m0 * sd.x) * (s0 * un.x);
    acc[1][0] += (float)(tot[2] + 8 * m1 * sd.x) * (s1 * un.x);
    if (BP == 2) {
      acc[0][BP - 1] += (float)(tot[1] + 8 * m0 * sd.y) * (s0 * un.y);
      acc[1][BP - 1] += (float)(tot[3] + 8 * m1 * sd.y) * (s1 * un.y);
    }
  }
  const float f = t == 0 ? 4096.f : t == 1 ? 16.f : t == 2 ? 0.0625f : 0.f;  // 2^16, 2^8, 1 over 16
  float* own = a.partial + ((size_t)blockIdx.x * W + warp) * 16 * BP;
#pragma unroll
  for (int b = 0; b < BP; b++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float v = t == 3 ? 0.f : acc[h][b] * f;
      v += __shfl_xor_sync(~0u, v, 1);
      v += __shfl_xor_sync(~0u, v, 2);
      if (t == 0) __stcg(own + b * 16 + h * 8 + g, v);
    }
  finish<BP>(a, sg, tid, 0);
}

// w >> SH, to either side.
template <int SH>
DEV u32 at(u32 w, u32 mask) { return (SH >= 0 ? w >> (SH < 0 ? 0 : SH) : w << (SH < 0 ? -SH : 0)) & mask; }

// c |= a plane of two bits, or one, at bit UP of its bytes.
template <int UP>
DEV void two(u32 (&c)[16], uint4 w) {
  const u32 v[4] = {w.x, w.y, w.z, w.w}, M = 0x03030303u << UP;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    c[i] |= at<0 - UP>(v[i], M), c[4 + i] |= at<2 - UP>(v[i], M);
    c[8 + i] |= at<4 - UP>(v[i], M), c[12 + i] |= at<6 - UP>(v[i], M);
  }
}
template <int UP>
DEV void one(u32 (&c)[16], uint2 w) {
  const u32 v[2] = {w.x, w.y}, M = 0x01010101u << UP;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    c[i] |= at<0 - UP>(v[i], M), c[4 + i] |= at<2 - UP>(v[i], M);
    c[8 + i] |= at<4 - UP>(v[i], M), c[12 + i] |= at<6 - UP>(v[i], M);
    c[2 + i] |= at<1 - UP>(v[i], M), c[6 + i] |= at<3 - UP>(v[i], M);
    c[10 + i] |= at<5 - UP>(v[i], M), c[14 + i] |= at<7 - UP>(v[i], M);
  }
}

// The codes of a tile as bytes: c[4 q + i], byte j, of lane 4 g + t is that of row g + 8 (i & 1) and of column
// 32 q + 16 (i >> 1) + 4 t + j. p: the tile's codes, 16 bytes a lane further on.
DEV void unpack(u32 (&c)[16], const u8* p, u32 width, int lane) {
#pragma unroll
  for (int i = 0; i < 16; i++) c[i] = 0;
  if (width & 8) {
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const uint4 w = *(const uint4*)(p + q * 512);
      c[4 * q] = w.x, c[4 * q + 1] = w.y, c[4 * q + 2] = w.z, c[4 * q + 3] = w.w;
    }
  }
  if (width & 4) {
#pragma unroll
    for (int q = 0; q < 2; q++) {
      const uint4 w = *(const uint4*)(p + q * 512);
      const u32 v[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int i = 0; i < 4; i++) c[4 * q + i] = v[i] & 0x0f0f0f0fu, c[8 + 4 * q + i] = v[i] >> 4 & 0x0f0f0f0fu;
    }
  }
  if (width & 2) {
    const uint4 w = *(const uint4*)(p + (width & 4) * 256);
    if (width & 4) two<4>(c, w); else two<0>(c, w);
  }
  if (width & 1) {
    const uint2 w = *(const uint2*)(p + (width & 6) * 256 - lane * 8);
    if (width & 4) one<4>(c, w); else if (width & 2) one<2>(c, w); else one<0>(c, w);
  }
}

// Of b in shared memory: the first k and column, and how far the next 16 k and the next 8 columns are.
template <int BT>
DEV unsigned long long descriptor(u32 first) {
  return (first & 0x3ffff) >> 4 | (unsigned long long)(D * BT * 128 >> 4) << 16 | (unsigned long long)(128 >> 4) << 32;
}

// F items of the same groups, W warps each, and a warp that copies. Shared memory: barriers (of the ring's records,
// full and free; of each warp's codes), labels and nibbles, units and sums of x, the ring, codes. Only `wgmma` reads
// the ring: what threads themselves read there, a copy into it could overtake, unless a fence of both proxies came
// between.
template <int BT>
DEV void large(const Args& a) {
  constexpr int REC = rec_large(BT), UNITS = BT * 64;
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
  const int ks = blockIdx.x % a.splits, sg0 = blockIdx.x / a.splits * F, items = min(F, a.strips - sg0);
  const int g0 = ks * a.groups / a.splits, n = (ks + 1) * a.groups / a.splits - g0;
  const u32 uoff = 128 + F * W * a.deep * 16, xoff = (uoff + a.deep * UNITS + 127) & ~127u, coff = xoff + S * REC;
  const u32 full = sm(s), free = full + S * 8, loaded = free + S * 8;
  if (tid == 0) {
    for (int i = 0; i < S; i++) bar_init(full + i * 8), bar_init(free + i * 8, items * W);
    for (int i = 0; i < F * W; i++) bar_init(loaded + i * 8);
    bar_init_done();
  }
  __syncthreads();
  gdc_launch();
  u32 stage = 0, parity = 0;  // of the ring
  if (warp == F * W) {
    if (lane < items * W) {
      const int at = ((sg0 + lane / W) * a.splits + ks) * W + lane % W;
      const int4 e = __ldg(a.table + at);
      const u32 bar = loaded + lane * 8, to = sm(s) + coff + (lane / W * a.most + e.w) * 256;
      bar_expect(bar, n * 16 + e.y * 256);
      if (e.y) bulk(to, a.codes + (size_t)e.x * 256, e.y * 256, bar);
      bulk(sm(s) + 128 + lane * a.deep * 16, a.meta + (size_t)at * a.deep, n * 16, bar);
    }
    gdc_wait();
    if (lane) return;
    for (int j = 0; j < n; j++) {
      const u32 bar = full + stage * 8;
      bar_wait(free + stage * 8, parity ^ 1);  // returns at once for a record not yet used
      bar_expect(bar, REC + (j ? 0 : n * UNITS));
      if (!j) bulk(sm(s) + uoff, a.rec + (size_t)a.groups * REC + g0 * UNITS, n * UNITS, bar);
      bulk(sm(s) + xoff + stage * REC, a.rec + (size_t)(g0 + j) * REC, REC, bar);
      if (++stage == S) stage = 0, parity ^= 1;
    }
    return;
  }
  const int mine = warp / W, sg = sg0 + mine, at = (sg * a.splits + ks) * W + warp % W;
  if (mine >= items) return;
  const u8* codes = s + coff + (mine * a.most + __ldg(a.table + at).w) * 256;
  const uint4* meta = (const uint4*)(s + 128) + warp * a.deep;
  gdc_wait();
  bar_wait(loaded + warp * 8);
  float acc[BT][4] = {};
  int k[D * BT * 4] = {};
#pragma unroll 1
  for (int j = 0; j < n; j++) {
    const uint4 m = meta[j];
    const u32 width = m.z >> 8 & 15;
    u32 c[16];
    unpack(c, codes + (m.z >> 16) * 256 + lane * 16, width, lane);
    bar_wait(full + stage * 8, parity);
    wgmma_fence();
    const u32 x = sm(s) + xoff + stage * REC;
#pragma unroll
    for (int q = 0; q < 4; q++) wgmma(k, c + 4 * q, descriptor<BT>(x + q * D * BT * 256), q > 0);
    wgmma_wait(k);
    if (lane == 0) bar_arrive(free + stage * 8);
    if (++stage == S) stage = 0, parity ^= 1;
    if (!width) continue;
    float s0, s1;
    int m0, m1;
    steps(m, g, a.base, s0, s1, m0, m1, width);
    const float mf0 = 0.5f * m0, mf1 = 0.5f * m1;
    const float4* units = (const float4*)(s + uoff + j * UNITS) + t;  // of rows 2t, 2t + 1
#pragma unroll
    for (int bt = 0; bt < BT; bt++) {
      const float4 un = units[bt * 4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int* digit = k + bt * 4 + i;
        float f = (float)(digit[0] * 256 + digit[BT * 4]);  // at most 2^30 + 2^22
        f = f * 256.f + (float)digit[BT * 8];
        acc[bt][i] += (i & 2 ? s1 : s0) * (f * (i & 1 ? un.z : un.x) + (i & 2 ? mf1 : mf0) * (i & 1 ? un.w : un.y));
      }
    }
  }
  float* own = a.partial + (size_t)at * 16 * BT * 8;
#pragma unroll
  for (int bt = 0; bt < BT; bt++)
#pragma unroll
    for (int i = 0; i < 4; i++) __stcg(own + (bt * 8 + 2 * t + (i & 1)) * 16 + (i >> 1) * 8 + g, acc[bt][i]);
  finish<BT * 8>(a, sg, tid % (W * 32), mine);
}

// --- decoding ------------------------------------------------------------------------------------------------------

// W [out][nin] to y, columns in rounding order; tiles of width 0 are left out. A warp has a slot.
DEV void dense(const Args& a) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int sg = blockIdx.x / a.splits, ks = blockIdx.x % a.splits;
  const int g0 = ks * a.groups / a.splits, n = (ks + 1) * a.groups / a.splits - g0;
  const int at = blockIdx.x * W + warp;
  const u8* codes = a.codes + (size_t)__ldg(a.table + at).x * 256;
  gdc_wait();  // for the zeros in y
  for (int j = 0; j < n; j++) {
    const uint4 m = __ldg(a.meta + (size_t)at * a.deep + j);
    const u32 width = m.z >> 8 & 15;
    if (!width) continue;
    u32 c[16];
    unpack(c, codes + (m.z >> 16) * 256 + lane * 16, width, lane);
    float step[2];
    int middle[2];
    steps(m, g, a.base, step[0], step[1], middle[0], middle[1], width);
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const int row = (sg * W + warp) * 16 + g + 8 * (i & 1);
      const int column = (g0 + j) * 128 + 32 * (i >> 2) + 16 * (i >> 1 & 1) + 4 * t;
#pragma unroll
      for (int b = 0; b < 4; b++) {
        const float w = ((float)(c[i] >> (8 * b) & 255) + 0.5f * middle[i & 1]) * step[i & 1];
        if (row < a.out && column + b < a.nin) store(a.y, (size_t)row * a.nin + column + b, w, a.kind);
      }
    }
  }
}

// --- the kernels, by rows of activations ---------------------------------------------------------------------------

#define KERNEL(name, bounds, body) extern "C" __global__ void __launch_bounds__ bounds name(const Args a) { body; }
KERNEL(prepare_1, (W * 32), (prepare<1, 1>(a)))
KERNEL(prepare_2, (W * 32), (prepare<2, 1>(a)))
KERNEL(prepare_8, (W * 32), (prepare<0, 1>(a)))
KERNEL(prepare_16, (W * 32), (prepare<0, 2>(a)))
KERNEL(multiply_1, (W * 32), small<1>(a))
KERNEL(multiply_2, (W * 32), small<2>(a))
// 2 blocks on a multiprocessor. A quarter of it holds every fourth warp, so that 9 warps take the room of 12: at most
// 80 registers. (With 94, 4096 x 11008 and 16 rows took 26 us in place of 21.)
KERNEL(multiply_8, ((F * W + 4) * 32, 2), large<1>(a))
KERNEL(multiply_16, ((F * W + 4) * 32, 2), large<2>(a))
KERNEL(decode, (W * 32), dense(a))
