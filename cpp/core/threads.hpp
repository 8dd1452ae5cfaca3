// How many threads a call may have. Backends ask, too; hence nothing here but plain functions.
#pragma once

#include "contract.hpp"

namespace gatewise {

// Whether this build can use more than one thread.
bool has_threads();

void set_threads(int threads);
int threads();

// The least multiply-adds a step for which a call is cut over threads.
Size set_threading_threshold(Size operations);

// How many threads a call deserves that does `operations` multiply-adds a step in `steps` steps and can be cut into
// `parts`.
int threads_for(Size operations, Size steps, Size parts);

// How many threads of a team of `wanted` the system lets this thread have now: all of them, or where it has no more
// threads to give those of its last team.
int startable_threads(int wanted);
// How many the team of this thread then had: fewer, where OpenMP has a limit of its own.
void set_last_team(int threads);

}  // namespace gatewise
