// Prints what tests/host/layouts.py says that CuTe prints: lines `name: layout`, and `name: low high` of descriptors whose tile
// stands at address 0. Built against the headers of nvidia-cutlass by tests/host/test_layouts.py; it runs without a GPU.
#include <cstdio>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

using namespace cute;
namespace gmma = SM90::GMMA;

namespace {

template <class Layout>
void show(const char* name, Layout layout) {
  std::printf("%s: ", name);
  print(layout);
  std::printf("\n");
}

// [ROWS, 16] at column 0 of a tile whose columns are contiguous.
template <int WIDTH, int ROWS, class Atom>
void k_major(Atom atom) {
  const auto tile = tile_to_shape(atom, Shape<Int<ROWS>, _128>{});
  char name[40];
  std::snprintf(name, sizeof name, "K %d %d", WIDTH, ROWS);
  show(name, tile);
  const auto tensor = make_tensor(make_smem_ptr(static_cast<const half_t*>(nullptr)), tile);
  const auto part = local_tile(tensor, Shape<Int<ROWS>, _16>{}, make_coord(_0{}, _0{}));
  const auto descriptor = gmma::make_gmma_desc<gmma::Major::K>(part);
  std::printf("K descriptor %d %d: %u %u\n", WIDTH, ROWS, descriptor.reg32_[0], descriptor.reg32_[1]);
}

// [N, 16 of 48 rows] whose N columns are contiguous.
template <int WIDTH, int N, class Atom>
void mn_major(Atom atom) {
  const auto tile = tile_to_shape(atom, Shape<Int<N>, _48>{}, Step<_2, _1>{});
  char name[40];
  std::snprintf(name, sizeof name, "MN %d %d", WIDTH, N);
  show(name, tile);
  const auto tensor = make_tensor(make_smem_ptr(static_cast<const half_t*>(nullptr)), tile);
  const auto part = local_tile(tensor, Shape<Int<N>, _16>{}, make_coord(_0{}, _0{}));
  const auto descriptor = gmma::make_gmma_desc<gmma::Major::MN>(part);
  std::printf("MN descriptor %d %d: %u %u\n", WIDTH, N, descriptor.reg32_[0], descriptor.reg32_[1]);
}

}  // namespace

int main() {
  using Mma = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;
  show("MMA_A", Mma::ALayout{});
  show("MMA_B", Mma::BLayout{});
  show("MMA_C", Mma::CLayout{});
  show("LDMATRIX", Copy_Traits<SM75_U32x4_LDSM_N>::DstLayout{});
  show("LDMATRIX_TRANSPOSED", Copy_Traits<SM75_U16x8_LDSM_T>::DstLayout{});
  show("WGMMA_A", gmma::ALayout_64x16{});
  show("WGMMA_C 64", gmma::CLayout_64xN<64>{});
  show("WGMMA_C 80", gmma::CLayout_64xN<80>{});
  show("WGMMA_C 112", gmma::CLayout_64xN<112>{});
  k_major<32, 64>(gmma::Layout_K_SW32_Atom<half_t>{});
  k_major<32, 112>(gmma::Layout_K_SW32_Atom<half_t>{});
  k_major<64, 64>(gmma::Layout_K_SW64_Atom<half_t>{});
  k_major<64, 112>(gmma::Layout_K_SW64_Atom<half_t>{});
  k_major<128, 64>(gmma::Layout_K_SW128_Atom<half_t>{});
  k_major<128, 112>(gmma::Layout_K_SW128_Atom<half_t>{});
  mn_major<32, 64>(gmma::Layout_MN_SW32_Atom<half_t>{});
  mn_major<32, 80>(gmma::Layout_MN_SW32_Atom<half_t>{});
  mn_major<64, 64>(gmma::Layout_MN_SW64_Atom<half_t>{});
  mn_major<128, 64>(gmma::Layout_MN_SW128_Atom<half_t>{});
  mn_major<128, 128>(gmma::Layout_MN_SW128_Atom<half_t>{});
  return 0;
}
