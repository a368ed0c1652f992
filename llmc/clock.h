// The two clocks that measure: when something was, and how long a thread has worked.
#pragma once

#include <chrono>
#include <ctime>

// Steady time in seconds.
inline double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds that this thread has had a core: they stand still while it sleeps and while another program runs there.
inline double seconds_on_core() {
    timespec time{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}
