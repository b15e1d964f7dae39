package options

import (
	"testing"

	"github.com/spf13/pflag"

	"github.com/podidentity/podidentity/nmi/telemetry"
)

func TestAnUnknownLevelIsRefused(t *testing.T) {
	for argument, want := range map[string]string{
		"--log-level=debug": "", "--log-level=info": "", "--log-level=warn": "", "--log-level=error": "",
		"--log-level=":       `--log-level "" is unknown; give debug, info, warn or error`,
		"--log-level=fatal":  `--log-level "fatal" is unknown; give debug, info, warn or error`,
		"--log-level=panic":  `--log-level "panic" is unknown; give debug, info, warn or error`,
		"--audit-level=info": "", "--audit-level=warn": "", "--audit-level=off": "",
		"--audit-level=":      `--audit-level "" is unknown; give info, warn or off`,
		"--audit-level=fatal": `--audit-level "fatal" is unknown; give info, warn or off`,
	} {
		o := New()
		flags := pflag.NewFlagSet("", pflag.ContinueOnError)
		o.AddFlags(flags)
		if err := flags.Parse([]string{argument}); err != nil {
			t.Fatal(err)
		}
		called, got := false, ""
		if err := o.WithLoggers(func(telemetry.Loggers) error { called = true; return nil }); err != nil {
			got = err.Error()
		}
		if got != want || called != (want == "") {
			t.Errorf("%s: got the error %q, want %q; the function was called: %v", argument, got, want, called)
		}
	}
}
