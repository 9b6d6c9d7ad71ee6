// SPDX-License-Identifier: Apache-2.0
//
// Several independent vectors that advance together, operation by operation. A polynomial is one long dependent chain,
// and the processor's window sees only the next ~60 operations: with one chain after the other in the instruction
// stream it waits. Written on Staged values, the same formula comes out interleaved. Include after simd.hpp, inside the
// anonymous namespace.
template <class V, int K>
struct Staged {
  V v[K];
};
template <class V, int K>
struct ScalarOf<Staged<V, K>> {
  using type = Scalar<V>;
};

#define ROM_EACH(K) \
  ROM_UNROLL        \
  for (int i = 0; i < (K); ++i)

#define ROM_STAGED_OPERATOR(op)                                         \
  template <class V, int K>                                             \
  ROM_INLINE Staged<V, K> operator op(Staged<V, K> a, Staged<V, K> b) { \
    ROM_EACH(K) a.v[i] = a.v[i] op b.v[i];                              \
    return a;                                                           \
  }                                                                     \
  template <class V, int K>                                             \
  ROM_INLINE Staged<V, K> operator op(Staged<V, K> a, V b) {            \
    ROM_EACH(K) a.v[i] = a.v[i] op b;                                   \
    return a;                                                           \
  }                                                                     \
  template <class V, int K>                                             \
  ROM_INLINE Staged<V, K> operator op(Staged<V, K> a, Scalar<V> b) {    \
    ROM_EACH(K) a.v[i] = a.v[i] op b;                                   \
    return a;                                                           \
  }
ROM_STAGED_OPERATOR(+)
ROM_STAGED_OPERATOR(-)
ROM_STAGED_OPERATOR(*)

template <class V, int K>
ROM_INLINE Staged<V, K> at_most(Staged<V, K> x, Scalar<V> bound) {
  ROM_EACH(K) x.v[i] = at_most(x.v[i], bound);
  return x;
}
template <class V, int K>
ROM_INLINE Staged<V, K> at_least(Staged<V, K> x, Scalar<V> bound) {
  ROM_EACH(K) x.v[i] = at_least(x.v[i], bound);
  return x;
}
template <class V, int K>
ROM_INLINE Staged<V, K> reciprocal(Staged<V, K> x) {
  ROM_EACH(K) x.v[i] = reciprocal(x.v[i]);
  return x;
}
template <class V, int K>
ROM_INLINE Reduced<Staged<V, K>> reduce(Staged<V, K> x) {
  Reduced<Staged<V, K>> out;
  ROM_EACH(K) {
    const Reduced<V> one = reduce(x.v[i]);
    out.shift.v[i] = one.shift;
    out.r.v[i] = one.r;
  }
  return out;
}
template <class V, int K>
ROM_INLINE Staged<V, K> scale_by(Staged<V, K> p, Staged<V, K> shift) {
  ROM_EACH(K) p.v[i] = scale_by(p.v[i], shift.v[i]);
  return p;
}
template <int K>
ROM_INLINE LogSplit<Staged<vfloat, K>> log_split(Staged<vfloat, K> e, Staged<vfloat, K> y) {
  LogSplit<Staged<vfloat, K>> out;
  ROM_EACH(K) {
    const LogSplit<vfloat> one = log_split(e.v[i], y.v[i]);
    out.k.v[i] = one.k;
    out.f.v[i] = one.f;
  }
  return out;
}
template <int K>
ROM_INLINE Staged<vfloat, K> select_above(Staged<vfloat, K> x, float bound, Staged<vfloat, K> above,
                                          Staged<vfloat, K> below) {
  ROM_EACH(K) below.v[i] = select_above(x.v[i], bound, above.v[i], below.v[i]);
  return below;
}
template <int K>
ROM_INLINE SoftplusResult<Staged<vdouble, K>> softplus(Staged<vdouble, K> x) {
  SoftplusResult<Staged<vdouble, K>> out;
  ROM_EACH(K) {
    const SoftplusResult<vdouble> one = softplus(x.v[i]);
    out.value.v[i] = one.value;
    out.slope.v[i] = one.slope;
  }
  return out;
}
