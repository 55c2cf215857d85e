-- The value at which a bin of a quarter octave begins.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   bins as in value_bin; a bin ends where the next one begins. A bin of values below zero (below -1024) begins
--          at the larger magnitude.
-- Ask it:  select bin_edge(2)  -- 1.5
create or replace macro bin_edge(bin) as
case
    when (bin) >= -1024 then pow(2, floor((bin) / 4)) * (1 + ((bin) - 4 * floor((bin) / 4)) / 4)
    else -pow(2, floor((-2047 - (bin)) / 4)) * (1 + (-2047 - (bin) - 4 * floor((-2047 - (bin)) / 4)) / 4)
end;
