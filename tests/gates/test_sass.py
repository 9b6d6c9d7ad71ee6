from gates import sass

CODE = [
    (0x000, "MOV", " R1, c[0x0][0x28]"),
    (0x010, "LDG.E.128", " R4, [R2.64]"),  # outer loop begins
    (0x020, "FFMA", " R5, R4, R4, R5"),  # inner loop begins
    (0x030, "BRA", " 0x20"),
    (0x040, "BRA", " 0x60"),  # forward: no loop
    (0x050, "BRA", " 0x10"),
    (0x060, "EXIT", ""),
    (0x070, "BRA", " 0x70"),  # the trap behind the code
]


def test_an_inner_loop_is_counted_apart_from_its_outer_one():
    outer, inner = sass.loops(CODE)
    assert (outer.begin, outer.end, outer.depth, outer.size) == (0x10, 0x50, 0, 3)
    assert (inner.begin, inner.end, inner.depth, inner.size) == (0x20, 0x30, 1, 2)
    assert inner.count("FFMA", "FMUL") == 1 and outer.count("LDG") == 1
