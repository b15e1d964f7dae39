package iptables

import (
	"context"
	"errors"
	"net"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// lockName is an abstract socket. Its names belong to the network namespace, as the rules do, so whoever binds it has the
// rules to himself; and the kernel releases it when its owner dies, however that happens. No file, no mount.
const lockName = "@podidentity-capture"

const (
	// lockTimeout is well above the longest repair. After it we go on without: any process in the namespace can hold the
	// name, and must not be able to keep rules from being repaired.
	lockTimeout = 10 * time.Second
	lockRetryInterval = 20 * time.Millisecond
)

// acquireLock waits until no other process works on the rules of this network namespace, as the old and the new node server
// would during an upgrade: each would build its next generation in the chain that the other has just put in force.
func acquireLock(ctx context.Context, log *zap.Logger, limit time.Duration) (done func(), err error) {
	enough := time.NewTimer(limit)
	defer enough.Stop()
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
			log.Warn("capture does not wait for other processes", zap.Error(err))
			return func() {}, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-enough.C:
			log.Warn("capture waited long enough for another process that holds the socket", zap.String("socket", lockName))
			return func() {}, nil
		case <-retry.C:
		}
	}
}
