package iptables

import (
	"context"
	"errors"
	"net"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// lockName is the name of an abstract Unix socket. Each network namespace has its own rules and its own abstract names.
// So the process that binds the name holds the lock for the rules of its namespace. The kernel releases the name
// whenever the process ends, and no file or mount is needed.
const lockName = "@podidentity-capture"

const (
	// lockTimeout is well above the usual time of a repair. After lockTimeout the caller continues without the lock:
	// any process in the namespace can bind the name, and no such process must be able to prevent repairs.
	lockTimeout       = 10 * time.Second
	lockRetryInterval = 20 * time.Millisecond
)

// acquireLock waits until no other process holds the lock for the rules of this network namespace, and acquires the
// lock. During an upgrade the old and the new NMI run at the same time: without the lock each could build its next
// generation in the chain that the other has just activated. If the lock is not available within limit, or the socket
// cannot be bound for another reason, acquireLock logs this and returns without the lock. The only error that it
// returns is that of ctx.
func acquireLock(ctx context.Context, log *zap.Logger, limit time.Duration) (release func(), err error) {
	timeout := time.NewTimer(limit)
	defer timeout.Stop()
	retry := time.NewTicker(lockRetryInterval)
	defer retry.Stop()
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: lockName, Net: "unixgram"})
		if err == nil {
			return func() { socket.Close() }, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			log.Warn("cannot lock NMI's iptables rules against changes by another NMI process; continuing without the lock", zap.Error(err))
			return func() {}, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-timeout.C:
			log.Warn("another process held the lock of NMI's iptables rules for the whole wait; continuing without the lock; to find the process, run `ss -xap` as root on the node and search for the socket", zap.String("socket", lockName), zap.Duration("waited", limit))
			return func() {}, nil
		case <-retry.C:
		}
	}
}
