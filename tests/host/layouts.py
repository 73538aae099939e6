"""Layouts as CuTe prints them (nvidia-cutlass 4.2.0, cute::print of the traits that are named), and what they mean.
test_layouts.py has them printed again.

They are the judge of the twins: a kernel and its twin by one hand could share a misreading.
"""

from __future__ import annotations

import ast

# Of mma.m16n8k16: (lane, register) -> place in the matrix, columns first (MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>).
MMA_A = "((4,8),(2,2,2)):((32,1),(16,8,128))"
MMA_B = "((4,8),(2,2)):((16,1),(8,64))"
MMA_C = "((4,8),(2,2)):((32,1),(16,8))"
# Of ldmatrix .x4: (lane, bit) -> bit of the rows that lanes 0 to 31 name (SM75_U32x4_LDSM_N, SM75_U16x8_LDSM_T).
LDMATRIX = "(32,(32,4)):(32,(1,1024))"
LDMATRIX_TRANSPOSED = "((4,8),(16,2,4)):((256,16),(1,128,1024))"
# Of wgmma: (thread, register) -> place in the matrix of 64 rows, columns first (ALayout_64x16, CLayout_64xN).
WGMMA_A = "((4,8,4),(2,2,2)):((128,1,16),(64,8,512))"
WGMMA_C = "((4,8,4),(2,2,{n_8})):((128,1,16),(64,8,512))"
# Tiles in shared memory, (row, column) -> element before the swizzle, and what make_gmma_desc writes for 16 columns (rows).
K_MAJOR = {
    32: "((8,{rows_8}),(16,{columns_16})):((16,128),(1,{rows}*16))",  # tile_to_shape(Layout_K_SW32_Atom, (rows, columns))
    64: "((8,{rows_8}),(32,{columns_32})):((32,256),(1,{rows}*32))",
    128: "((8,{rows_8}),(64,{columns_64})):((64,512),(1,{rows}*64))",
}
MN_MAJOR = {
    32: "((16,{columns_16}),(8,{rows_8})):((1,{rows}*16),(16,128))",  # tile_to_shape(Layout_MN_SW32_Atom, .., Step<_2, _1>)
    64: "((32,{columns_32}),(8,{rows_8})):((1,{rows}*32),(32,256))",
    128: "((64,{columns_64}),(8,{rows_8})):((1,{rows}*64),(64,512))",
}
SWIZZLE_BITS = {32: 1, 64: 2, 128: 3}  # Sw<B, 4, 3> of byte addresses


def layout(text: str, **sizes: int) -> list[list[int]]:
    """table[i][j]: the index of (i, j), both counted through their own modes, first modes fastest."""
    shape, stride = (_numbers(part) for part in text.format(**sizes).split(":"))
    first, second = (_offsets(s, d) for s, d in zip(shape, stride, strict=True))
    return [[a + b for b in second] for a in first]


def _numbers(text: str):
    def fold(node: ast.AST):
        if isinstance(node, ast.Tuple):
            return tuple(fold(x) for x in node.elts)
        if isinstance(node, ast.BinOp):
            return fold(node.left) * fold(node.right)
        return ast.literal_eval(node)

    return fold(ast.parse(text, mode="eval").body)


def _offsets(shape, stride) -> list[int]:
    if not isinstance(shape, tuple):
        return [i * stride for i in range(shape)]
    offsets = [0]
    for s, d in zip(shape, stride, strict=True):
        offsets = [a + b for b in _offsets(s, d) for a in offsets]
    return offsets


def swizzled(byte: int, width: int) -> int:
    """Sw<B, 4, 3>: bits 4 .. 4 + B are exclusive-ored with the bits 3 places above."""
    mask = (1 << SWIZZLE_BITS[width]) - 1
    return byte ^ ((byte >> 7 & mask) << 4)
