// The schemas of all ops. Implementations: cpu/ and cuda/; fake kernels, autograd and documentation: moemm/ops/.
#include <torch/library.h>

TORCH_LIBRARY(moemm, m) {
  m.def(
      "route_topk(Tensor logits, Tensor modality, Tensor allowed, Tensor? bias=None, *, int top_k, str kind, "
      "bool renormalise) -> (Tensor gates, Tensor experts, Tensor load, Tensor prob, Tensor z, Tensor tokens)");
  m.def(
      "route_topk_backward(Tensor dgates, Tensor dprob, Tensor dz, Tensor logits, Tensor modality, Tensor allowed, "
      "Tensor experts, *, str kind, bool renormalise) -> Tensor");
  m.def(
      "plan(Tensor experts, *, int num_experts, int alignment=1) -> (Tensor counts, Tensor offsets, Tensor order, "
      "Tensor inverse)");
  m.def("permute(Tensor x, Tensor order, Tensor inverse) -> Tensor");
  m.def("permute_backward(Tensor grad, Tensor order, Tensor inverse) -> Tensor");
  m.def("combine(Tensor y, Tensor inverse, Tensor gates, Tensor? residual=None) -> Tensor");
  m.def("combine_backward(Tensor grad, Tensor y, Tensor inverse, Tensor gates) -> (Tensor, Tensor)");
  m.def(
      "grouped_mlp(Tensor x, Tensor offsets, Tensor[] w1, Tensor[] w2, Tensor[] b1, Tensor[] b2, *, str activation, "
      "bool recompute) -> (Tensor y, Tensor z)");
  m.def(
      "grouped_mlp_backward(Tensor grad, Tensor z, Tensor x, Tensor offsets, Tensor[] w1, Tensor[] w2, Tensor[] b1, "
      "Tensor[] b2, *, str activation) -> (Tensor, Tensor[], Tensor[], Tensor[], Tensor[])");
  m.def(
      "moe_ffn(Tensor x, Tensor gates, Tensor experts, Tensor[] w1, Tensor[] w2, Tensor[] b1, Tensor[] b2, "
      "Tensor? residual=None, *, str activation, bool recompute) -> (Tensor out, Tensor z)");
  m.def(
      "moe_ffn_backward(Tensor grad, Tensor z, Tensor x, Tensor gates, Tensor experts, Tensor[] w1, Tensor[] w2, "
      "Tensor[] b1, Tensor[] b2, *, str activation) -> (Tensor, Tensor, Tensor[], Tensor[], Tensor[], Tensor[])");
}
