//! ublkup: one backend, two doors.
