#!/bin/bash
# Runs every test that `make test` has built, and the Python tests: black box, plots, comparison with PyTorch. Ends with
# the line `N passed, N failed`, and with status 1 if a test failed. Output of what passes goes to build/logs.
#
# Each suite ends its output with GoogleTest's lines, pytest's line, or `N passed, N failed`; one that crashes, or runs
# no test, counts as a failed test.
set -u
cd "$(dirname "$0")/.."
mkdir -p build/logs
passed=0 failed=0 skipped=0

count() { grep -oE "$1" | grep -oE '[0-9]+' | tail -n 1; }

suite() {  # name, command...
    local name=$1 log=build/logs/$1.log start=$SECONDS status summary good bad
    shift
    "$@" >"$log" 2>&1 </dev/null
    status=$?
    summary=$(grep -E '^\[  (PASSED|FAILED)  \] [0-9]+ test' "$log"; tail -n 1 "$log")
    good=$(count 'PASSED  \] [0-9]+|[0-9]+ passed' <<<"$summary")
    bad=$(count 'FAILED  \] [0-9]+|[0-9]+ (failed|error)' <<<"$summary")
    good=${good:-0} bad=${bad:-0}
    case $name in fuzz_*) [ "$good" -ge 2000 ] && good=1 ;; esac  # thousands of mutated files are one test
    if [ "$bad" = 0 ] && { [ $status != 0 ] || [ "$good" = 0 ]; }; then
        bad=1
        echo "$name: exit status $status after $good passed tests" >>"$log"
    fi
    printf '  %-28s %5d passed %3d failed %5d s\n' "$name" "$good" "$bad" $((SECONDS - start))
    [ "$bad" = 0 ] || { echo "---- $log"; tail -n 60 "$log"; echo "----"; }
    passed=$((passed + good)) failed=$((failed + bad))
    skip=$(count '[0-9]+ skipped|SKIPPED \] [0-9]+' <"$log")
    grep '^SKIPPED' "$log" | sed 's/^/    /'                                                # pytest
    grep -A1 ': Skipped$' "$log" | grep -vE ': Skipped$|^--' | sort -u | sed 's/^/    SKIPPED /'  # GoogleTest
    skipped=$((skipped + ${skip:-0}))
}

# ThreadSanitizer cannot place its memory where addresses are randomised with many bits.
fixed_addresses=$(setarch -R true 2>/dev/null && echo setarch -R)
for program in build/tests/*_test build/tests/fuzz_*; do
    source=dev/tests/$(basename "$program").cpp
    [ -x "$program" ] && [ -f "$source" ] && suite "$(basename "$program")" $fixed_addresses "$program"
done
for script in dev/tests/test_*.py; do
    [ -f "$script" ] && suite "$(basename "$script" .py)" build/venv/bin/python -m pytest -q -rs -p no:cacheprovider "$script"
done

echo
[ $skipped = 0 ] || echo "$skipped skipped, for the reasons above"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
