// Podclient is the program in the images local/pause and local/e2e of the test cluster: the process of a pod's sandbox,
// and a client that requests a token as soon as it starts.
//
// The client does not hide failures from the end-to-end tests. It sends one request, as early as a process can, and
// never retries, so it reports what the first request of any application gets.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

const usage = `usage:
  podclient pause                     wait for a signal
  podclient sleep DURATION            wait that long, then exit 0 (for example 30s)
  podclient token [FLAGS]             request a token once, print the outcome as one JSON line, then wait for a signal
flags of token:
  --resource URI      audience of the token (default https://management.azure.com/)
  --query K=V[&…]     further parameters, for example client_id=…
  --url URL           the whole URL, instead of --resource and --query
  --timeout DURATION  time limit of the request (default 2m0s)
  --exit              exit after the request: 0 if it got a token, else 1
`

func main() {
	// The client must send its request as early as a process can, so main does no work that a subcommand does not need.
	args := os.Args[1:]
	if len(args) == 0 {
		args = []string{"pause"}
	}
	switch args[0] {
	case "pause":
		waitForSignal()
	case "sleep":
		sleep(args[1:])
	case "token":
		os.Exit(token(args[1:]))
	case "help", "-h", "--help":
		fmt.Print(usage)
	default:
		fail(fmt.Sprintf("unknown subcommand %q", args[0]))
	}
}

// waitForSignal waits for SIGINT or SIGTERM. Until then it reaps orphans: if the containers of a pod share one PID
// namespace, the process of the sandbox is PID 1 in it, and so the parent of all orphans.
func waitForSignal() {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGCHLD)
	for s := range signals {
		if s != syscall.SIGCHLD {
			return
		}
		for {
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 && err != syscall.EINTR {
				break
			}
		}
	}
}

func sleep(args []string) {
	if len(args) != 1 {
		fail("sleep requires one argument, DURATION")
	}
	d, err := time.ParseDuration(args[0])
	if err != nil {
		fail(err.Error())
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	select {
	case <-time.After(d):
	case <-signals:
	}
}

func fail(message string) {
	fmt.Fprintf(os.Stderr, "podclient: %s\n%s", message, usage)
	os.Exit(2)
}
