// Long calls: they let other Python threads run, look for signals meanwhile, and survive the end of the interpreter.
#pragma once

#include <cfenv>
#include <chrono>
#include <type_traits>

#include "../core/contract.hpp"
#include "pybind.hpp"

namespace gatewise {

// Below about 5 us, letting other Python threads in costs more than it gives.
constexpr Size gil_operations = 128 * 1024;

// Without the GIL. On the main thread, where Python handles signals, it takes the GIL again now and then to handle
// those that have come; a handler that raises asks the call to end.
class WithoutGil : private Interrupt {
 public:
  WithoutGil();
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

  Interrupt* interrupt() { return this; }
  // Once, before this is destroyed. Not a destructor: a thread that asks for the GIL while the interpreter is finalised
  // never returns from here.
  void take_back();
  // Whether a handler has raised: its exception is the present one.
  bool has_raised() const { return asked; }

 private:
  using Clock = std::chrono::steady_clock;
  void handle_signals();

  PyThreadState* state_;
  Clock::time_point next_look_;
  std::fenv_t callers_mode_;
};

// Whether this thread is the one on which Python handles signals.
bool is_main_thread();
void find_main_thread();  // once, at import

// Calls work(interrupt), or work(), which takes `operations` multiply-adds or so: if these are many, without the GIL
// and with an interrupt to look at; else with null. Throws what a signal's handler raised.
template <class Work>
void without_gil(Size operations, const Work& work) {
  const auto call = [&](Interrupt* interrupt) {
    if constexpr (std::is_invocable_v<const Work&, Interrupt*>)
      work(interrupt);
    else
      work();
  };
  if (operations < gil_operations) return call(nullptr);
  WithoutGil released;
  try {
    call(released.interrupt());
  } catch (...) {
    released.take_back();
    throw;
  }
  released.take_back();
  if (released.has_raised()) throw py::error_already_set();
}

}  // namespace gatewise
