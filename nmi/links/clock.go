package links

import (
	"bytes"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// clock is the clock of the node. Tests use another one.
type clock struct {
	boot string // ID of this boot; nothing is remembered if it is empty
	// read returns the time and the time since the boot, of the same moment. The second does not change when somebody sets
	// the clock.
	read func() (now time.Time, sinceBoot time.Duration)
}

func (c clock) sinceBoot() time.Duration {
	_, sinceBoot := c.read()
	return sinceBoot
}

// offset returns the time since 1970 at which the node booted, by the current clock.
func (c clock) offset() time.Duration {
	now, sinceBoot := c.read()
	return time.Duration(now.UnixNano()) - sinceBoot
}

// systemClock returns the clock of the kernel.
func systemClock() clock {
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	var uptime unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &uptime) // exists since Linux 2.6.39
	start, base := time.Now(), time.Duration(uptime.Nano())
	return clock{
		boot: string(bytes.TrimSpace(boot)),
		// Since the start of NMI this is Go's monotonic clock, which stops while the node is suspended. Then the offset
		// changes, as if the clock had been set.
		read: func() (time.Time, time.Duration) {
			now := time.Now()
			return now, base + now.Sub(start)
		},
	}
}
