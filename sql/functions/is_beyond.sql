-- True if a value is beyond a threshold: above it, or in a signed run below it if the threshold is below zero.
--
-- Grain:   scalar.
-- Reads:   src_is_signed
-- Units:   those of the value.
-- Ask it:  select is_beyond(0.7, 0.5)  -- true
create or replace macro is_beyond(value, threshold) as
(case when src_is_signed() and threshold < 0 then value < threshold else value > threshold end);
