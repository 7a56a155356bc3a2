// The schemas of all ops. Implementations: cpu/ and cuda/; fake kernels, autograd and documentation: moemm/ops/.
#include <torch/library.h>

TORCH_LIBRARY(moemm, m) {
  m.def("permute(Tensor x, Tensor order, Tensor inverse) -> Tensor");
  m.def("permute_backward(Tensor grad, Tensor order, Tensor inverse) -> Tensor");
  m.def("combine(Tensor y, Tensor inverse, Tensor gates) -> Tensor");
  m.def("combine_backward(Tensor grad, Tensor y, Tensor inverse, Tensor gates) -> (Tensor, Tensor)");
}
