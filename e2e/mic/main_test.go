package mic

import (
	"os"
	"runtime/debug"
	"testing"

	"github.com/go-logr/logr"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/klog/v2"
)

func TestMain(m *testing.M) {
	// One of these handlers sleeps until a millisecond after its previous call, and at its first call until a millisecond
	// after the start of the program. The program starts outside of a synctest bubble, at a time of the real clock. The
	// fake clock of a bubble starts in the year 2000. So a first call inside a bubble would sleep for decades.
	utilruntime.ErrorHandlers = nil //nolint:reassign // the variable is there to be set
	klog.SetLogger(logr.Discard())  // klog would log thousands of lost connections
	debug.SetGCPercent(400)         // a sequence is short, and most of its memory becomes garbage only when it ends
	os.Exit(m.Run())
}
