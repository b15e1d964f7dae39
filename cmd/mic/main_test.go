package main

import (
	"context"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestPlanAndUninstallAcceptTheFlagsOfMIC(t *testing.T) {
	for _, name := range []string{"plan", "uninstall"} {
		c, _, err := command().Find([]string{name})
		if err != nil {
			t.Fatal(err)
		}
		if err := c.ParseFlags([]string{"--cloudconfig=/a", "--leader-election-name=b", "--detach-delay=1m", "--forceNamespaced"}); err != nil {
			t.Errorf("mic %s: %v", name, err)
		}
	}
}

func TestTheEarlierNameOfWaitForSignalWorksAndIsHidden(t *testing.T) {
	for _, name := range []string{"wait-for-signal", "hold"} {
		c, _, err := command().Find([]string{"uninstall"})
		if err != nil {
			t.Fatal(err)
		}
		if err := c.ParseFlags([]string{"--" + name}); err != nil {
			t.Fatal(err)
		}
		if wait, err := c.Flags().GetBool("wait-for-signal"); err != nil || !wait {
			t.Errorf("with --%s, waiting is %t, %v", name, wait, err)
		}
		if hidden := c.Flags().Lookup(name).Hidden; hidden != (name == "hold") {
			t.Errorf("--%s is hidden: %t", name, hidden)
		}
	}
}

func TestWaitForSignalIsReadyUntilItIsCancelled(t *testing.T) {
	listener, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	port := listener.Addr().(*net.TCPAddr).Port
	ctx, end := context.WithTimeout(t.Context(), time.Minute)
	defer end()
	ended := make(chan error, 1)
	go func() { ended <- serveReadiness(ctx, listener) }()
	response, err := http.Get("http://127.0.0.1:" + strconv.Itoa(port) + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusOK {
		t.Errorf("/readyz responds %s", response.Status)
	}
	taken := waitForSignal(ctx, port)
	if taken == nil || !strings.Contains(taken.Error(), "mic uninstall is complete") {
		t.Errorf("waitForSignal on a port that is in use: %v", taken)
	}
	end()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
