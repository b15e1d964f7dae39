package azure

import (
	"strings"
	"time"
)

// armSwitches are the switches for the settings of the fake ARM.
var armSwitches = []switchKind[ARMSettings]{
	durationSwitch("delay", 0, func(s *ARMSettings) *time.Duration { return &s.Delay }),
	intSwitch("retry-after", "seconds, 0 to 3600 (0: no header)", 0, 3600, func(s *ARMSettings) *int { return &s.RetryAfter }),
	boolSwitch("limits", func(s *ARMSettings) *bool { return &s.Limits }),
	boolSwitch("early", func(s *ARMSettings) *bool { return &s.Early }),
	boolSwitch("queue", func(s *ARMSettings) *bool { return &s.Queue }),
	boolSwitch("late-errors", func(s *ARMSettings) *bool { return &s.LateErrors }),
	oneOfSwitch("naming", func(s *ARMSettings) *Naming { return &s.Naming }, namings...),
	boolSwitch("dangling", func(s *ARMSettings) *bool { return &s.Dangling }),
	oneOfSwitch("casing", func(s *ARMSettings) *Casing { return &s.Casing }, casings...),
	choiceSwitch("etags", "false", "true", func(s *ARMSettings) *bool { return &s.NoETags }),
	durationSwitch("propagation", 0, func(s *ARMSettings) *time.Duration { return &s.Propagation }),
}

func findARMSwitch(key string) (switchKind[ARMSettings], bool) {
	service, name, _ := strings.Cut(key, ".")
	for _, k := range armSwitches {
		if service == serviceARM && k.name == name {
			return k, true
		}
	}
	return switchKind[ARMSettings]{}, false
}
