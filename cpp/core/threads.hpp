// How many threads a call may have. Backends call these functions, too, so they are plain ones.
#pragma once

#include "contract.hpp"

namespace gatewise {

// Whether this build can use more than one thread.
bool has_threads();

void set_threads(int threads);
int threads();

// Sets the least number of multiply-adds a step for which a call is split over threads; returns the former one.
Size set_threading_threshold(Size operations);

// How many threads pay for a call of `steps` steps of `operations` multiply-adds each that can be split into `parts`.
int threads_for(Size operations, Size steps, Size parts);

// How many threads of a team of `threads` the system can start for this thread now: all of them, or, if it has no more
// threads to give, as many as this thread's last team had.
int startable_threads(int threads);
// Tells how many threads the team of this thread then had: fewer, where OpenMP has a limit of its own.
void set_last_team(int threads);

}  // namespace gatewise
