// Runs every CUDA kernel of csrc/cuda a few times on small inputs, for the sanitizers and to compare results: its
// output depends on neither the order of threads nor the seed.
//
//     drive          everything
//     drive topk     the kernels of topk_flips alone; drive rest: all others
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "ccu_fast.h"
#include "common/half.h"

namespace {

uint32_t state = 1;
float uniform() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
}

// Aligned as by a GPU's allocator.
template <class T>
T* memory(size_t n) {
  return static_cast<T*>(std::aligned_alloc(256, (n * sizeof(T) + 255) / 256 * 256));
}
float* numbers(size_t n) {
  float* p = memory<float>(n);
  for (size_t i = 0; i < n; ++i) p[i] = uniform();
  return p;
}
template <class T>
double checksum(const T* p, size_t n) {
  double sum = 0.0;
  for (size_t i = 0; i < n; ++i)
    if (std::isfinite(static_cast<double>(p[i]))) sum += static_cast<double>(p[i]) * static_cast<double>(i % 97 + 1);
  return sum;
}
void expect_ok(const char* what, int status) {
  if (status == CCU_OK) return;
  std::printf("%s: status %d, %s\n", what, status, status >= CCU_CUDA_ERROR ? ccu_cuda_error_text(status) : "");
  std::exit(1);
}

void topk(int64_t rows, int64_t tokens, int64_t dim, int64_t k, ccu_topk_path path, bool ties, bool filter = false,
          bool use_lowest = true) {
  const int64_t padded = (dim + 7) / 8 * 8;
  float* embedding = numbers(tokens * dim);
  float* grad = numbers(rows * dim);
  if (ties)
    for (int64_t i = 0; i < tokens * dim; ++i) embedding[i] = std::copysign(1.0f, embedding[i]);
  if (path == CCU_TOPK_ZERO)
    for (int64_t i = 0; i < rows * dim; ++i) grad[i] = 0.0f;
  auto* table = memory<ccu::f16>(tokens * padded);
  float* operand = memory<float>(rows * padded);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t d = 0; d < padded; ++d)
      table[t * padded + d] = ccu::from_float<ccu::f16>(d < dim ? embedding[t * dim + d] : 0.0f);
  std::vector<float> about(4 * rows);
  const double coarse[3] = {1.0, 0.01 * static_cast<double>(dim), std::sqrt(static_cast<double>(dim))};
  ccu_topk_describe_args d{};
  d.grad = grad;
  d.rows = rows;
  d.dim = dim;
  d.padded = padded;
  d.coarse = coarse;
  d.certify = 1;
  d.operand = operand;
  d.about = about.data();
  d.maximize = filter;
  auto* half = memory<ccu::f16>(rows * padded);
  auto for_gemm = d;
  for_gemm.half = 1;
  for_gemm.operand = half;
  expect_ok("topk_describe", ccu_cuda_topk_describe(&for_gemm));
  double halves = 0.0;
  for (int64_t i = 0; i < rows * padded; ++i) halves += ccu::to_float(half[i]) * static_cast<float>(i % 97 + 1);
  expect_ok("topk_describe", ccu_cuda_topk_describe(&d));
  for (int64_t r = 0; r < rows; ++r) about[4 * r + 3] = static_cast<float>(path);
  float* scores = memory<float>(rows * tokens);
  std::vector<int64_t> ids(rows * k), count(rows), current(rows, tokens / 2);
  std::vector<float> delta(rows * k);
  std::vector<double> score(rows * k);
  std::vector<uint8_t> valid(rows), redo(rows);
  ccu_cuda_topk_args a{};
  a.scores = scores;
  a.rows = rows;
  a.tokens = a.vocabulary = tokens;
  a.about = about.data();
  a.grad = grad;
  a.dim = a.embedding_stride = dim;
  a.embedding = embedding;
  a.embedding_step = 1;
  a.current = current.data();
  a.exclude_current = 1;
  std::vector<uint8_t> allowed(tokens);
  for (uint8_t& may : allowed) may = uniform() < 0.8f;
  if (filter) {
    a.maximize = 1;
    a.allowed = allowed.data();
    a.penalty = numbers(tokens);
  }
  a.k = k;
  a.ids = ids.data();
  a.delta = delta.data();
  a.score = score.data();
  a.count = count.data();
  a.valid = valid.data();
  a.redo = redo.data();
  a.table = table;
  a.operand = operand;
  a.padded = padded;
  const int64_t most = int64_t{CCU_CUDA_GROUP_STEP} * CCU_CUDA_TOPK_GROUPS;  // tokens in groups of one step
  a.group = CCU_CUDA_GROUP_STEP * ((tokens + most - 1) / most);
  a.lowest = memory<uint32_t>(rows * ((tokens + a.group - 1) / a.group));
  expect_ok("topk_scores", ccu_cuda_topk_scores(&a));
  if (!use_lowest) a.lowest = nullptr;
  expect_ok("topk_select", ccu_cuda_topk_select(&a));
  uint64_t all = 0;
  for (int64_t id : ids) all = all * 31 + static_cast<uint64_t>(id);
  std::printf("topk_flips %ld x %ld x %ld, k %ld, path %d: redo %d, count %ld, ids %ld, scores %.17g, halves %.17g\n",
              static_cast<long>(rows), static_cast<long>(tokens), static_cast<long>(dim), static_cast<long>(k), path,
              redo[0], static_cast<long>(count[0]), static_cast<long>(all >> 1), checksum(score.data(), score.size()),
              halves);
}

void pgd_step(int64_t samples, int64_t channels, int64_t inner, ccu_pgd_norm norm, bool check, bool wrong = false) {
  const int64_t n = samples * channels * inner;
  float* delta = numbers(n);
  float* out = memory<float>(n);
  float* channel = numbers(4 * channels);
  double* parts = memory<double>(2 * samples * CCU_PGD_SLICES);
  ccu_pgd_step_args a{};
  a.delta = delta;
  float* grad = numbers(n);
  if (wrong) grad[n / 2] = grad[n - 1] = NAN;
  unsigned long long refused = 0, told = 0;
  a.refused = &refused;
  a.told = &told;
  a.grad = grad;
  a.image = numbers(n);
  a.out = out;
  a.samples = samples;
  a.channels = channels;
  a.inner = inner;
  a.step = 0.1f;
  a.eps = 0.5f;
  a.lower = -1.0f;
  a.upper = 1.0f;
  a.channel = check ? nullptr : channel;
  a.check = check;
  a.norm = norm;
  a.parts = parts;
  expect_ok("pgd_step", ccu_cuda_pgd_step(&a));
  if (wrong != (told != 0)) std::exit(1);
  std::printf("pgd_step_ %d: %.17g %.17g\n", norm, checksum(delta, n), wrong ? 0.0 : checksum(out, n));
}

void noise_store(int64_t size) {
  auto* noise = memory<int8_t>(5 * size);
  auto* delta = memory<int8_t>(4 * size);
  for (int64_t i = 0; i < 5 * size; ++i) noise[i] = static_cast<int8_t>(8 * uniform());
  for (int64_t i = 0; i < 4 * size; ++i) delta[i] = static_cast<int8_t>(8 * uniform());
  const std::vector<int64_t> rows{1, 1, 3, 4}, order{0, 2, 1, 3};
  float* images = numbers(4 * size);
  ccu_noise_update_args u{};
  u.noise = noise;
  u.noise_dtype = u.delta_dtype = CCU_I8;
  u.rows = rows.data();
  u.order = order.data();
  u.count = 4;
  u.total = 5;
  u.size = size;
  u.delta = delta;
  u.eps = 8.0f;
  expect_ok("noise_update", ccu_cuda_noise_update(&u));
  ccu_noise_add_args a{};
  a.images = a.out = images;
  a.image_dtype = CCU_F32;
  a.noise = noise;
  a.noise_dtype = CCU_I8;
  a.index = rows.data();
  a.items = 4;
  a.channels = 1;
  a.inner = size;
  a.rows = 5;
  a.upper = 1.0f;
  expect_ok("noise_add", ccu_cuda_noise_add(&a));
  unsigned long long found = 0;
  ccu_cuda_noise_check_args c{};
  c.values = images;
  c.whole = 1;
  c.slack = 1e-3f;
  c.count = 4 * size;
  c.found = &found;
  expect_ok("noise_check", ccu_cuda_noise_check(&c));
  std::printf("noise store: %.17g %.17g %llu\n", checksum(noise, 5 * size), checksum(images, 4 * size), found);
}

void candidate_losses(int64_t batch, int64_t candidates, bool alone) {
  float* s = numbers(batch * batch);
  for (int64_t i = 0; i < batch; ++i) s[i * batch + i] += 9.0f;  // one term that is more than half of its row
  float* out = memory<float>(batch * candidates);
  const float factor = 0.5f;
  ccu_cuda_candidate_args a{};
  a.s = s;
  a.similarity = numbers(batch * candidates * batch);
  a.scale = 2.0f;
  a.factor = &factor;
  a.batch = a.rows = batch;
  a.candidates = candidates;
  a.rest = alone ? nullptr : memory<float>(batch * batch);
  a.columns = alone ? nullptr : memory<double>(batch);
  a.out = out;
  if (!alone) expect_ok("candidate_rest", ccu_cuda_candidate_rest(&a));
  expect_ok("candidate_losses", ccu_cuda_candidate_losses(&a));
  std::printf("candidate_losses: %.17g\n", checksum(out, batch * candidates));
}

// The cheap cases first: where a barrier is missing, the first case that notices ends the run.
void topk_cases() {
  topk(1, 10, 8, 9, CCU_TOPK_INVALID, false);
  topk(1, 40, 8, 39, CCU_TOPK_SCAN, false);
  topk(1, 2100, 3, 9, CCU_TOPK_ZERO, false);
  topk(2, 700, 20, 16, CCU_TOPK_SCAN, false);
  topk(2, 700, 20, 16, CCU_TOPK_SCAN, false, true);
  for (bool filter : {false, true}) topk(2, 700, 20, 16, CCU_TOPK_SCAN, false, filter, false);
  topk(1, 2100, 3, 300, CCU_TOPK_EXACT, false);
  topk(1, 5000, 1, 5, CCU_TOPK_SCAN, true);    // more ties than a block holds
  topk(1, 17000, 3, 4, CCU_TOPK_SCAN, false);  // groups of more than one step
}

void other_cases() {
  for (bool alone : {true, false}) candidate_losses(19, 3, alone);
  for (int64_t inner : {64, 33}) {
    noise_store(inner);
    for (bool check : {false, true}) {
      pgd_step(2, 3, inner, CCU_LINF, check);
      pgd_step(2, 3, inner, CCU_L2, check);
    }
    for (ccu_pgd_norm norm : {CCU_LINF, CCU_L2}) pgd_step(2, 3, inner, norm, true, true);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::string part = count > 1 ? arguments[1] : "";
  if (part != "rest") topk_cases();
  if (part != "topk") other_cases();
  std::puts("done");
}
