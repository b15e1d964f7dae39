package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestAnUnknownSubcommandIsAnError(t *testing.T) {
	for _, args := range [][]string{{"azure"}, {"azure", "arm"}} {
		cmd := command()
		var out bytes.Buffer
		cmd.SetOut(&out)
		cmd.SetArgs(args)
		if err := cmd.ExecuteContext(t.Context()); err != nil || !strings.Contains(out.String(), "Available Commands:") {
			t.Errorf("%v: error %v, output %q, want the help", args, err, out.String())
		}
		cmd.SetArgs(append(args, "nope"))
		if err := cmd.ExecuteContext(t.Context()); err == nil || !strings.Contains(err.Error(), `"nope"`) {
			t.Errorf("%v nope: error %v, want one that names the unknown word", args, err)
		}
	}
}
