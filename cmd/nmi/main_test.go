package main

import (
	"testing"

	"github.com/spf13/cobra"
)

func TestTheOldNameOfWaitForSignalStillWorksAndIsHidden(t *testing.T) {
	for _, name := range []string{"wait-for-signal", "hold"} {
		c := uninstallCommand(t)
		if err := c.ParseFlags([]string{"--" + name}); err != nil {
			t.Errorf("--%s: %v", name, err)
			continue
		}
		if wait, err := c.Flags().GetBool("wait-for-signal"); err != nil || !wait {
			t.Errorf("--%s: got wait-for-signal %v (%v)", name, wait, err)
		}
		if hidden := c.Flags().Lookup(name).Hidden; hidden != (name == "hold") {
			t.Errorf("--%s: hidden is %v", name, hidden)
		}
	}
}

func uninstallCommand(t *testing.T) *cobra.Command {
	t.Helper()
	c, _, err := command().Find([]string{"uninstall"})
	if err != nil {
		t.Fatal(err)
	}
	return c
}
