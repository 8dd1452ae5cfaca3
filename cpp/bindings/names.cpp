#include "names.hpp"

#include "pybind.hpp"

namespace gatewise {
namespace {

constexpr std::pair<const char*, Activation> activations[] = {{"linear", Activation::linear},
                                                              {"affine", Activation::affine},
                                                              {"relu", Activation::relu},
                                                              {"leaky_relu", Activation::leaky_relu},
                                                              {"thresholded_relu", Activation::thresholded_relu},
                                                              {"elu", Activation::elu},
                                                              {"selu", Activation::selu},
                                                              {"tanh", Activation::tanh},
                                                              {"scaled_tanh", Activation::scaled_tanh},
                                                              {"sigmoid", Activation::sigmoid},
                                                              {"hard_sigmoid", Activation::hard_sigmoid},
                                                              {"softmax", Activation::softmax},
                                                              {"softplus", Activation::softplus},
                                                              {"softsign", Activation::softsign},
                                                              {"silu", Activation::silu},
                                                              {"gelu", Activation::gelu},
                                                              {"exp", Activation::exp}};

constexpr std::pair<const char*, Operation> operations[] = {
    {"dense", Operation::dense},           {"activate", Operation::activate}, {"normalize", Operation::normalize},
    {"layer_norm", Operation::layer_norm}, {"add", Operation::add},           {"multiply", Operation::multiply},
    {"average", Operation::average}};

template <class Value, std::size_t count>
const Value* find(const std::string& name, const std::pair<const char*, Value> (&values)[count]) {
  for (const auto& [text, value] : values)
    if (name == text) return &value;
  return nullptr;
}

}  // namespace

Cell cell_of(const std::string& name) {
  if (const Cell* cell = find(name, cells)) return *cell;
  throw py::value_error("cell: expected lstm, gru, rnn_tanh or rnn_relu, got " + name);
}

Function function_of(const NamedFunction& function) {
  const auto& [name, alpha, beta] = function;
  if (const Activation* activation = find(name, activations)) return {*activation, alpha, beta};
  throw py::value_error("internal: an unknown activation, " + name);
}

Operation operation_of(const std::string& name) {
  if (const Operation* operation = find(name, operations)) return *operation;
  throw py::value_error("internal: an unknown operation, " + name);
}

}  // namespace gatewise
