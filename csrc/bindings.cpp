// The Python module moemm._C: importing it registers the ops of library.cpp; build_info() says how it was built.
#include <pybind11/pybind11.h>

#include "moemm/build_config.h"  // written by setup.py

namespace {

// moemm/ops/backend.py looks for this text in the file *before* loading it: a library built against another torch
// fails to load with missing symbols, or loads and crashes.
__attribute__((used)) const char kBuiltFor[] = "moemm-built-for-torch=" MOEMM_TORCH_VERSION ";";

#ifdef MOEMM_DEBUG
constexpr bool kDebug = true;
#else
constexpr bool kDebug = false;
#endif

#ifdef MOEMM_WITH_CUDA
constexpr bool kCuda = true;
#else
constexpr bool kCuda = false;
#endif

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = MOEMM_VERSION;
  info["torch"] = MOEMM_TORCH_VERSION;
  info["compiler"] = MOEMM_COMPILER " " __VERSION__;
  info["flags"] = MOEMM_FLAGS;
  info["debug"] = kDebug;
  info["cuda"] = kCuda;
  info["cuda_archs"] = MOEMM_CUDA_ARCHS;
  info["why"] = MOEMM_WHY;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of moemm. Import moemm.ops, which checks that this library fits the installed torch.";
  m.def("build_info", &build_info, "How this library was built: versions, compiler, flags, devices.");
}
