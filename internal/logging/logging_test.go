package logging

import (
	"bytes"
	"encoding/json"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

func TestLinesAreJSONOrText(t *testing.T) {
	var out bytes.Buffer
	NewLogger(zapcore.AddSync(&out), zap.InfoLevel, false).Warn("hello\nforged", zap.Int("n", 1))
	var line struct {
		Level, Msg string
		Time       time.Time
		N          int
	}
	if err := json.Unmarshal(out.Bytes(), &line); err != nil || strings.Count(out.String(), "\n") != 1 {
		t.Fatalf("%v: %s", err, out.String())
	}
	if line.Level != "warn" || line.Msg != "hello\nforged" || line.N != 1 || line.Time.IsZero() {
		t.Errorf("the line has the fields %+v", line)
	}
	out.Reset()
	NewLogger(zapcore.AddSync(&out), zap.InfoLevel, true).Info("hello")
	if !strings.Contains(out.String(), "\tINFO\thello\n") {
		t.Errorf("the line is %q", out.String())
	}
}

func TestLinesBelowTheLevelAreDropped(t *testing.T) {
	var out bytes.Buffer
	NewLogger(zapcore.AddSync(&out), zap.WarnLevel, false).Info("hello")
	if out.Len() > 0 {
		t.Errorf("a line below the level was written: %q", out.String())
	}
}

func TestBufferedLinesAppearInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out lockedBuffer
		buffered, stop := Buffer(zapcore.AddSync(&out))
		log := NewLogger(buffered, zap.InfoLevel, false)
		log.Info("first")
		if out.String() != "" {
			t.Error("the line is not buffered")
		}
		time.Sleep(FlushInterval + time.Millisecond)
		synctest.Wait()
		if !strings.Contains(out.String(), "first") {
			t.Errorf("after FlushInterval the output is %q", out.String())
		}
		log.Info("second")
		stop()
		if !strings.Contains(out.String(), "second") {
			t.Errorf("after stop the output is %q", out.String())
		}
	})
}

// lockedBuffer is a buffer that one goroutine reads while another writes.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
