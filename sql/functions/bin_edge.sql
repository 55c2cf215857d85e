-- The value at which a bin of a quarter octave begins.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   bins as in value_bin; a bin ends where the next one begins.
-- Ask it:  select bin_edge(2)  -- 1.5
create or replace macro bin_edge(bin) as
pow(2, floor((bin) / 4)) * (1 + ((bin) - 4 * floor((bin) / 4)) / 4);
