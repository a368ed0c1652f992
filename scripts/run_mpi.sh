#!/bin/sh
# Ranks as processes, with what mpirun wants on a laptop: scripts/run_mpi.sh 4 --schedule helix ...
# The first argument is the number of ranks, the others go to ./train_gpt (PROGRAM=FILE: to that). On several hosts:
# MPIRUN_FLAGS="--hostfile hosts".
set -eu

case "${1:-}" in
    "" | *[!0-9]*)
        echo "run_mpi.sh: the first argument is the number of ranks: scripts/run_mpi.sh 4 --schedule helix" >&2
        exit 2 ;;
esac
ranks=$1
shift
if ! command -v mpirun >/dev/null; then
    echo "run_mpi.sh: there is no mpirun; install Open MPI (apt-get install openmpi-bin libopenmpi-dev) and build again," >&2
    echo "or use threads: ./train_gpt --ranks $ranks" >&2
    exit 2
fi
program=${PROGRAM:-$(dirname "$0")/../train_gpt}

flags=
if mpirun --version | grep -q "Open MPI"; then
    # The program divides the cores among its ranks itself. Between hosts, messages go on while a rank computes.
    flags="--oversubscribe --bind-to none --mca btl_tcp_progress_thread 1"
    [ "$(id -u)" != 0 ] || flags="$flags --allow-run-as-root"
fi

# mpirun kills the ranks a second after it gets SIGTERM or Ctrl-C, too soon for a checkpoint. Its longer kill timeout is
# of no use: with --mca odls_base_sigkill_timeout 10, Open MPI 4.1 passes the SIGTERM on only after 10 s, exits with 1
# whatever the ranks return, and when a rank has died it takes 20 s to end, though the others end by themselves after 1 s
# (with 3: 6 s; with 1, the default: 2 s). SIGUSR2 means the same to the ranks (a checkpoint, then exit 75) and it passes
# that on at once. So mpirun runs out of the terminal's reach, and is ended with this script.
# shellcheck disable=SC2086  # flags are split on purpose
setsid setpriv --pdeathsig TERM mpirun -np "$ranks" $flags ${MPIRUN_FLAGS:-} "$program" "$@" <&0 &
job=$!
trap 'kill -USR2 $job; trap "kill -TERM $job" TERM INT' TERM INT
trap 'kill -USR2 $job' USR2
trap 'kill -USR1 $job' USR1
trap 'pkill -QUIT -P $job || true' QUIT  # mpirun does not pass it on; its children are the ranks of this host
status=0
wait $job || status=$?
while kill -0 $job 2>/dev/null; do  # a signal has ended the wait, not mpirun
    status=0
    wait $job || status=$?
done
exit $status
