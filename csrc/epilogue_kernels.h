#pragma once
#include "epilogue.h"
#include "vec.h"

namespace llmrt {
namespace {

inline F32 activate(F32 x, Epilogue e) {
  switch (e) {
    case Epilogue::relu:
      return relu(x);
    case Epilogue::silu:
    case Epilogue::silu_mul:
      return silu(x);
    case Epilogue::gelu:
    case Epilogue::gelu_mul:
      return gelu(x);
    case Epilogue::gelu_tanh:
    case Epilogue::gelu_tanh_mul:
      return gelu_tanh(x);
    default:
      return x;
  }
}

}  // namespace
}  // namespace llmrt
