"""How one rank calls all others to meet before they have done what they do by themselves."""

from __future__ import annotations

from mpi4py import MPI

from mpiml.team import wait

ASK, CALL = 1, 2  # tags


class Recall:
    """Messages that are sent only if somebody asks: a rank asks rank 0, which calls all others. Collective to make, and
    to `settle` when all have met."""

    def __init__(self, comm: MPI.Intracomm):
        self.comm, self.asked, self.called = MPI.Intracomm(comm.Dup()), False, False
        self._sent: list[MPI.Request] = []
        self._received = 0  # on rank 0, how many have asked; elsewhere, whether the call has come

    def ask(self) -> None:
        """Have all ranks called."""
        if self.asked or self.called:
            return
        self.asked = True
        if self.comm.rank:
            self._sent.append(self.comm.Isend(bytearray(), 0, ASK))
        else:
            self._call()

    @property
    def spoke(self) -> bool:
        """Whether this rank has sent messages."""
        return self.asked if self.comm.rank else self.called

    def heard(self) -> bool:
        """Whether this rank has been called, or has asked; to be asked now and then."""
        if self.comm.rank == 0:
            while self.comm.Iprobe(MPI.ANY_SOURCE, ASK):
                self._take(MPI.ANY_SOURCE, ASK)
                self._call()
        elif not self._received and self.comm.Iprobe(0, CALL):
            self._take(0, CALL)
            self.called = True
        return self.asked or self.called

    def settle(self, asked: int, called: bool) -> None:
        """Finish the messages of all, and be ready for others.

        Args:
            asked: how many ranks but rank 0 have asked.
            called: whether rank 0 has called.
        """
        if self.comm.rank == 0:
            while self._received < asked:
                self._take(MPI.ANY_SOURCE, ASK)
        elif called and not self._received:
            self._take(0, CALL)
        wait(self._sent)
        self._sent, self._received, self.asked, self.called = [], 0, False, False

    def free(self) -> None:
        """Give the communicator back; collective."""
        self.comm.Free()

    def _call(self) -> None:
        if not self.called:
            self.called = True
            self._sent += [self.comm.Isend(bytearray(), rank, CALL) for rank in range(1, self.comm.size)]

    def _take(self, source: int, tag: int) -> None:
        wait([self.comm.Irecv(bytearray(), source, tag)])
        self._received += 1
