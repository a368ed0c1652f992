// A save that is killed at any moment leaves a run that loads.
#include <random>
#include <regex>

// ptrace: processes that are killed while they save
#include <csignal>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>

#include "checkpoint_test.h"

// Saves 1, 2, 3 (again and again, so that steps are also replaced), keeping one.
int save_for_ever(const std::string& run) {
    for (int64_t i = 0;; ++i) save(run, 1 + i % 3, 1, 40'000);
}

TEST(Killed, AtRandomMomentsTheRunLoads) {
    const TemporaryDirectory run;
    std::mt19937 random(1);
    save(run, 3, 1);
    for (int trial = 0; trial < 60; ++trial) {
        const pid_t child = fork();
        if (child == 0) _exit(save_for_ever(run));
        usleep(std::uniform_int_distribution<useconds_t>(100, 30'000)(random));
        kill(child, SIGKILL);
        waitpid(child, nullptr, 0);
        ASSERT_GT(resumed_step(run), 0) << "trial " << trial;
    }
}

#if defined(__x86_64__)
// Runs two saves, the second of a step that exists, and kills the process just before its system call number `last`
// that changes storage. Returns those calls, one letter each; `ended` tells that the saves came to their end.
std::string killed_before(const std::string& run, size_t last, bool& ended, bool& traceable) {
    const pid_t child = fork();
    if (child == 0) {
        if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(97);
        raise(SIGSTOP);
        save(run, 2, 1, 40'000);
        save(run, 2, 1, 40'000);
        _exit(0);
    }
    const std::map<decltype(user_regs_struct::orig_rax), char> letters = {
        {SYS_write, 'w'}, {SYS_fsync, 'f'}, {SYS_rename, 'R'}, {SYS_mkdir, 'm'}, {SYS_unlinkat, 'u'}};
    std::string calls;
    int status = 0;
    waitpid(child, &status, 0);
    traceable = WIFSTOPPED(status);
    for (bool entry = false; WIFSTOPPED(status); entry = !entry) {  // stops are before and after a call by turns
        user_regs_struct registers{};
        ptrace(PTRACE_GETREGS, child, nullptr, &registers);
        const auto letter = letters.find(registers.orig_rax);
        if (entry && letter != letters.end()) calls += letter->second;
        if (calls.size() > last) kill(child, SIGKILL);
        else ptrace(PTRACE_SYSCALL, child, nullptr, nullptr);
        waitpid(child, &status, 0);
    }
    ended = WIFEXITED(status) && WEXITSTATUS(status) == 0;
    return calls;
}

TEST(Killed, BeforeEverySystemCallTheRunLoads) {
    bool ended = false, traceable = true;
    std::string calls;
    for (size_t last = 0; !ended; ++last) {
        const TemporaryDirectory run(path_exists("/dev/shm") ? "/dev/shm" : "");  // memory: thousands of syncs
        save(run, 1, 1);
        calls = killed_before(run, last, ended, traceable);
        if (!traceable) GTEST_SKIP() << "this machine does not permit ptrace";
        const int64_t step = resumed_step(run);
        ASSERT_TRUE(step == 1 || step == 2) << "killed at the end of " << calls;
        save(run, 3, 1);  // and it goes on
        ASSERT_EQ(resumed_step(run), 3) << "killed at the end of " << calls;
        ASSERT_EQ(list_directory(run.path + "/checkpoints").size(), 2u) << "killed at the end of " << calls;
    }
    // What a power cut could reorder is fixed by syncs: every file and the directory before it is renamed into sight,
    // that before LATEST, that before the former directory is renamed away and removed.
    std::printf("killed before each of: %s\n", calls.c_str());
    const std::string files = "m(w+f)+f", publish = "Rf", latest = "wfRf", removal = "Rfu+";
    const std::regex order("f" + files + publish + latest + removal + "f" + files + "R" + publish + latest + removal);
    EXPECT_TRUE(std::regex_match(calls, order)) << calls;
}
#endif
