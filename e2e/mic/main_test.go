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
	// One of these handlers sleeps until a millisecond after its previous call. At its first call it sleeps until a
	// millisecond after the start of the program. That earlier time can be one of the real clock. Inside a synctest
	// bubble the handler would then sleep for decades, because the fake clock of a bubble starts in the year 2000.
	utilruntime.ErrorHandlers = nil //nolint:reassign // the variable is there to be set
	klog.SetLogger(logr.Discard())  // klog would log thousands of lost connections
	debug.SetGCPercent(400)         // a sequence is short, and most of its memory becomes garbage only when it ends
	os.Exit(m.Run())
}
